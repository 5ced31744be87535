"""The HTTP process: `python -m deepseek_jax.serve.http_process CHANNEL LISTENER`, as the engine process starts it.

The arguments are file descriptors: of the socket to the engine process, and of the listening one. It needs no jax.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.serve.app import Service, make_app
from deepseek_jax.serve.chat_template import ChatTemplate
from deepseek_jax.serve.client import EngineClient, read_settings

MAX_CONNECTIONS = 512  # fits the usual limit of 1024 file descriptors
HEADER_SECONDS = 10  # for a request's headers
IDLE_SECONDS = 75  # between requests
SEND_SECONDS = 60  # for a client to read what has been sent
MAX_HEADER_BYTES = 64 * 1024
AFTER_ENGINE_SECONDS = 0.3  # to tell clients that the engine is gone
LOG_CONFIG: dict[str, Any] = {
  "version": 1,
  "disable_existing_loggers": False,
  "formatters": {"line": {"format": "%(levelname)s %(name)s: %(message)s"}},
  "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
  # asyncio warns again and again of a client that has left.
  "loggers": {name: {"handlers": ["stderr"], "level": "ERROR"} for name in ("uvicorn", "asyncio")},
}
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\nRetry-After: 1\r\n\r\n"


class BoundedProtocol(H11Protocol):
  """uvicorn's HTTP, with a bound on connections, and on how long a client may take to send headers or to read."""

  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self._timers: dict[str, asyncio.TimerHandle] = {}  # they abort the connection

  def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
    """Refuses one connection too many."""
    if len(self.connections) >= MAX_CONNECTIONS:
      self.transport = transport
      transport.write(BUSY)
      transport.close()
      return
    super().connection_made(transport)
    self._start_timer("headers", HEADER_SECONDS)

  def connection_lost(self, exc: Exception | None) -> None:
    """Ends the timers."""
    for name in list(self._timers):
      self._stop_timer(name)
    super().connection_lost(exc)

  def data_received(self, data: bytes) -> None:
    """Has a timer run while the headers of a request are incomplete."""
    super().data_received(data)
    if self.cycle is not None and not self.cycle.response_complete:
      self._stop_timer("headers")
    else:
      self._start_timer("headers", HEADER_SECONDS)

  def pause_writing(self) -> None:
    """Has a timer run while the client does not read."""
    super().pause_writing()
    self._start_timer("read", SEND_SECONDS)

  def resume_writing(self) -> None:
    """The client has read."""
    self._stop_timer("read")
    super().resume_writing()

  def timeout_keep_alive_handler(self) -> None:
    """Closes an idle connection, also where the client has not read the last response."""
    self._start_timer("read", SEND_SECONDS)
    super().timeout_keep_alive_handler()

  def _start_timer(self, name: str, seconds: float) -> None:
    """Unless it runs already."""
    if name not in self._timers and not self.transport.is_closing():
      self._timers[name] = self.loop.call_later(seconds, self.transport.abort)

  def _stop_timer(self, name: str) -> None:
    if timer := self._timers.pop(name, None):
      timer.cancel()


class Server(uvicorn.Server):
  """uvicorn's server, which leaves signals alone: the engine process says when to stop."""

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    """Captures none."""
    yield


async def serve(channel: socket.socket, listener: socket.socket) -> None:
  """Serves HTTP until the engine process says so, or is gone."""
  settings, lines, reader, writer = await read_settings(channel)
  tokenizer = load_tokenizer(settings.tokenizer)
  template = ChatTemplate(settings.chat_template, settings.template_tokens)
  loop = asyncio.get_running_loop()

  def shut_down(seconds: float) -> None:
    server.should_exit = True
    loop.call_later(seconds, client.fail_all, "the server is shutting down")

  client = EngineClient(reader, writer, lines, settings.max_batch + settings.max_queue, shut_down)
  config = uvicorn.Config(
    make_app(Service(settings, tokenizer, template, client)), http=BoundedProtocol, loop="asyncio", ws="none", lifespan="off",
    log_config=LOG_CONFIG, access_log=False, server_header=False, proxy_headers=False, timeout_keep_alive=IDLE_SECONDS,
    h11_max_incomplete_event_size=MAX_HEADER_BYTES,
  )  # fmt: skip
  server = Server(config)
  serving = asyncio.create_task(server.serve(sockets=[listener]))
  reading, beating = asyncio.create_task(client.read()), asyncio.create_task(client.beat())
  while not server.started and not serving.done():
    await asyncio.sleep(0.01)
  if server.started:
    client.ready()
  await asyncio.wait({serving, reading}, return_when=asyncio.FIRST_COMPLETED)
  beating.cancel()
  if reading.done():
    client.fail_all("the engine has ended")
    await asyncio.sleep(AFTER_ENGINE_SECONDS)
    reading.result()
  else:
    reading.cancel()
    serving.result()


def main(argv: list[str]) -> None:
  """Runs the process with the two file descriptors of `argv`. A UserError is one line on stderr, and exit code 1."""
  for number in (signal.SIGINT, signal.SIGTERM):  # sent to a whole group, they are for the engine process to handle
    signal.signal(number, signal.SIG_IGN)
  sockets = []
  for descriptor in argv[1:3]:
    os.set_inheritable(int(descriptor), False)
    sockets.append(socket.socket(fileno=int(descriptor)))
  try:
    asyncio.run(serve(*sockets))
  except UserError as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main(sys.argv)
