"""The loop of the engine process: messages in, steps of the engine, outputs out; and the HTTP process beside it."""

import contextlib
import select
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any, Protocol

from deepseek_jax.console import current_console
from deepseek_jax.errors import ConfigError, UserError
from deepseek_jax.generate.request import EngineStats, Output, Request
from deepseek_jax.serve.http_child import HttpChild
from deepseek_jax.serve.messages import ALIVE_SECONDS, MessageError, Settings, decode_request, encode, encode_outputs

GRACE_SECONDS = 5.0  # for open requests once the server is told to stop
EXIT_SECONDS = 2.0  # for the HTTP process after that
BACKOFF_SECONDS = (0.1, 5.0)  # before the HTTP process is started again: the first time, and at most
LONG_LIFE_SECONDS = 30.0  # of an HTTP process, after which its end counts as the first one


class Engine(Protocol):
  """What the loop needs of an engine."""

  max_length: int

  def add(self, request: Request) -> None:
    """Queues a request. Raises ConfigError for one that cannot be served."""

  def cancel(self, id: int) -> None:
    """Frees what a request has; unknown ids are ignored."""

  def step(self) -> list[Output]:
    """One step of all running requests."""

  @property
  def has_work(self) -> bool:
    """Whether a step has something to do."""

  def stats(self) -> EngineStats:
    """Statistics."""


class StopSignals:
  """SIGINT and SIGTERM as a file descriptor to wait for; the second one of a kind acts as without this."""

  def __init__(self) -> None:
    self.received: signal.Signals | None = None
    self._reader, self._writer = socket.socketpair()
    self._reader.setblocking(False)
    self._writer.setblocking(False)

  def fileno(self) -> int:
    """Readable once a signal has come."""
    return self._reader.fileno()

  @contextlib.contextmanager
  def installed(self) -> Iterator[None]:
    """Handles the signals during the block."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, self._handle) for number in numbers}
    wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
    try:
      yield
    finally:
      signal.set_wakeup_fd(wakeup)
      for number, handler in before.items():
        signal.signal(number, handler)
      self._reader.close()
      self._writer.close()

  def _handle(self, number: int, frame: Any) -> None:
    self.received = signal.Signals(number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

  def clear(self) -> None:
    """Takes what makes the descriptor readable."""
    with contextlib.suppress(BlockingIOError):
      self._reader.recv(64)


class EngineProcess:
  """An engine, the requests of the HTTP process, and that process, which is started again when it dies.

  Args:
    settings: for the HTTP process.
    listener: bound and listening. This process holds it too, so that connections wait while there is no HTTP process.
    announcement: printed once HTTP is served for the first time.
  """

  def __init__(self, engine: Engine, settings: Settings, listener: socket.socket, announcement: str):
    self._engine, self._settings, self._listener = engine, settings, listener
    self._announcement: str | None = announcement
    self._signals = StopSignals()
    self._child: HttpChild | None = None
    self._open: set[int] = set()  # requests of the child
    self._start_at = self._backoff = 0.0
    self._stop_at: float | None = None  # once a signal has come

  def run(self) -> int:
    """Serves until a signal. Returns the exit code. Raises UserError where the HTTP process never becomes ready."""
    with self._signals.installed():
      try:
        while True:
          if self._signals.received and self._stop_at is None:
            self._begin_stop()
          if self._stop_at is not None and (not self._child or time.monotonic() > self._stop_at):
            return 130 if self._signals.received is signal.SIGINT else 0
          if not self._child and time.monotonic() >= self._start_at:
            self._child = HttpChild(self._settings, self._listener)
          self._exchange()
          if self._engine.has_work:
            self._send_outputs(self._engine.step())
      finally:
        if self._child:
          self._child.close()
        self._listener.close()

  def _exchange(self) -> None:
    """Waits for the socket, a signal or the time to start the child, without waiting where the engine has work."""
    child = self._child
    readers: list[StopSignals | HttpChild] = [self._signals, *([child] if child else [])]
    writers = [child] if child and child.has_pending else []
    timeout = 0.0 if self._engine.has_work else self._wait_seconds()
    readable, writable, _ = select.select(readers, writers, [], timeout)
    if self._signals in readable:
      self._signals.clear()
    if not child:
      return
    try:
      if child in writable:
        child.flush()
      if child in readable:
        for message in child.receive():
          self._take(message)
      child.check_alive()
    except (ConnectionError, MessageError) as error:
      self._lose_child(str(error) or type(error).__name__)

  def _wait_seconds(self) -> float:
    """Until something has to be done without a message."""
    times = [time.monotonic() + ALIVE_SECONDS if self._child else self._start_at]
    times += [] if self._stop_at is None else [self._stop_at]
    return max(0.0, min(times) - time.monotonic())

  def _take(self, message: dict[str, Any]) -> None:
    match message["type"]:
      case "add":
        try:
          request = decode_request(message)
          self._engine.add(request)
        except ConfigError as error:
          self._send(encode({"type": "rejected", "id": message["id"], "message": str(error)}))
        else:
          self._open.add(request.id)
      case "cancel":
        if message.get("id") in self._open:
          self._engine.cancel(message["id"])
          self._open.remove(message["id"])
      case "stats":
        self._send(encode({"type": "stats", "stats": self._engine.stats().to_json()}))
      case "alive":
        pass
      case "ready":
        if self._announcement:
          current_console().print(self._announcement)
          self._announcement = None
      case other:
        raise MessageError(f"unknown message {other!r}")

  def _send_outputs(self, outputs: list[Output]) -> None:
    outputs = [output for output in outputs if output.id in self._open]
    self._open -= {output.id for output in outputs if output.finish_reason is not None}
    try:
      for line in encode_outputs(outputs):
        self._send(line)
    except (ConnectionError, MessageError) as error:
      self._lose_child(str(error) or type(error).__name__)

  def _send(self, line: bytes) -> None:
    if self._child:
      self._child.send(line)

  def _lose_child(self, reason: str) -> None:
    """Frees all that the child asked for, ends it if it still runs, and says when to start another one."""
    for id in sorted(self._open):
      self._engine.cancel(id)
    cancelled = len(self._open)
    self._open.clear()
    assert self._child
    how, life = self._child.close(), time.monotonic() - self._child.started
    self._child = None
    if self._stop_at is not None:
      return
    if self._announcement:
      raise UserError(f"the HTTP process ended before it was ready ({how}); its error is printed above")
    first, most = BACKOFF_SECONDS
    self._backoff = first if life > LONG_LIFE_SECONDS or not self._backoff else min(most, 2 * self._backoff)
    self._start_at = time.monotonic() + self._backoff
    current_console().print(
      f"the HTTP process is gone ({reason}; {how}): {cancelled} open requests are cancelled, it is started again",
      err=True,
    )

  def _begin_stop(self) -> None:
    """No new connections; open requests have GRACE_SECONDS."""
    self._listener.close()
    self._stop_at = time.monotonic() + GRACE_SECONDS + EXIT_SECONDS
    if self._child:
      try:
        self._child.send(encode({"type": "shutdown", "seconds": GRACE_SECONDS}))
      except ConnectionError as error:
        self._lose_child(str(error))


def run(engine: Engine, settings: Settings, listener: socket.socket, announcement: str) -> int:
  """Serves `engine` until SIGTERM (returns 0) or SIGINT (returns 130). The arguments are those of EngineProcess."""
  return EngineProcess(engine, settings, listener, announcement).run()
