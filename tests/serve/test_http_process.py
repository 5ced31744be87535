import contextlib
import socket
import subprocess
import sys

import pytest

from tests.serve.servers import ROOT, serving, wait_until


def test_it_imports_no_jax():
  code = "import sys, deepseek_jax.serve.http_process; print(*{name.partition('.')[0] for name in sys.modules})"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
  assert {"starlette", "numpy"} <= set(done.stdout.split())
  assert {"jax", "jaxlib", "flax", "orbax", "tensorstore", "torch"}.isdisjoint(done.stdout.split())


LIMITS = """
import sys
from deepseek_jax.serve import http_process
http_process.MAX_CONNECTIONS, http_process.HEADER_SECONDS, http_process.IDLE_SECONDS = 3, 0.5, 0.5
http_process.SEND_SECONDS = 0.5
http_process.main(sys.argv)
"""


@pytest.fixture(scope="module")
def limited(tmp_path_factory):
  """A server with small limits: its HTTP process runs another program, which sets them."""
  path = tmp_path_factory.mktemp("limits") / "limited_http.py"
  path.write_text(LIMITS)
  with serving(http_program=str(path), send_buffer=4096) as server:
    yield server


def connect(server):
  connection = socket.create_connection(("127.0.0.1", server.port))
  connection.settimeout(5)
  return connection


def test_connections_are_bounded(limited):
  limited.http.close()
  with contextlib.ExitStack() as stack:
    connections = [stack.enter_context(connect(limited)) for _ in range(4)]
    assert connections[-1].recv(100).startswith(b"HTTP/1.1 503 ")
  wait_until(lambda: answers(limited))


def answers(server):
  with connect(server) as connection:
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    return connection.recv(100).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("start", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"])
def test_headers_that_do_not_come(limited, start):
  wait_until(lambda: answers(limited))
  with connect(limited) as connection:
    connection.sendall(start)
    with contextlib.suppress(ConnectionResetError):
      assert connection.recv(100) == b""


def test_an_idle_connection_ends(limited):
  with connect(limited) as connection:
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"200 OK" in (received := connection.recv(1000))
    while part := connection.recv(1000):
      received += part
    assert received.endswith(b'{"status":"ok"}')


def test_long_headers_are_refused(limited):
  with connect(limited) as connection:
    with contextlib.suppress(ConnectionError):
      connection.sendall(b"GET /health HTTP/1.1\r\nX: " + b"x" * 100_000)
    with contextlib.suppress(ConnectionError):
      assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")
  wait_until(lambda: answers(limited))


def test_a_client_that_does_not_read_its_stream(limited):
  """Its connection ends, and its requests with it."""
  body = b'{"prompt": "' + b"a" * 50 + b'", "max_tokens": 345, "stream": true, "logprobs": 20, "n": 4}'
  with socket.socket() as connection:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", limited.port))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    connection.sendall(head % len(body) + body)
    wait_until(lambda: count_cancelled(limited) >= 1)


def count_cancelled(server):
  with connect(server) as connection:
    connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    text = b""
    while part := connection.recv(2**16):
      text += part
  line = next(
    (x for x in text.decode().splitlines() if x.startswith('deepseek_jax_choices_total{finish_reason="cancelled"')),
    " 0",
  )
  return float(line.rpartition(" ")[2])
