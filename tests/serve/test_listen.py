import socket

import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.serve.listen import is_local, listen, local_hosts, url


def test_an_address_of_this_machine():
  with listen("localhost", 0) as listener:
    assert is_local(listener)
    port = listener.getsockname()[1]
    assert url(listener) in (f"http://127.0.0.1:{port}", f"http://[::1]:{port}")
    assert set(local_hosts(listener, "LocalHost")) <= {"localhost", "127.0.0.1", "[::1]"}
    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


def test_all_addresses_are_not_local():
  with listen("0.0.0.0", 0) as listener:
    assert not is_local(listener)


def test_an_address_that_cannot_be_listened_on():
  with listen("127.0.0.1", 0) as listener:
    with pytest.raises(ConfigError, match="Address already in use; choose others by --host and --port"):
      listen("127.0.0.1", listener.getsockname()[1])
  with pytest.raises(ConfigError, match="cannot listen on"):
    listen("no.such.host.invalid", 0)
