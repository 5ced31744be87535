"""The address that the server listens on."""

import ipaddress
import socket

from deepseek_jax.errors import ConfigError

BACKLOG = 512  # connections that wait, as while the HTTP process is started again


def listen(host: str, port: int) -> socket.socket:
  """A socket that listens on `host`. port: 0 takes a free one. Raises ConfigError where it cannot."""
  try:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    return socket.create_server((host, port), family=family, backlog=BACKLOG)
  except OSError as error:
    raise ConfigError(
      f"cannot listen on {host} port {port}: {_reason(error)}; choose others by --host and --port"
    ) from None


def _reason(error: OSError) -> str:
  """Of `error`. socket.create_server adds the address to strerror, which the message has."""
  return str(error.strerror or error).partition(" (while attempting")[0]


def url(listener: socket.socket) -> str:
  """http://HOST:PORT of a listening socket."""
  host, port = listener.getsockname()[:2]
  return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_local(listener: socket.socket) -> bool:
  """Whether only this machine reaches the socket."""
  return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def local_hosts(listener: socket.socket, host: str) -> tuple[str, ...]:
  """Names of this machine that the header Host may have, without the port; `host` is the one of --host."""
  address = listener.getsockname()[0]
  address = f"[{address}]" if ":" in address else address
  return tuple(dict.fromkeys(("localhost", host.lower(), address)))
