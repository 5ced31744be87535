"""The HTTP process as the engine process has it: started over a socket pair, never waited for."""

import contextlib
import dataclasses
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from deepseek_jax.serve.messages import ALIVE_SECONDS, MAX_LINE_BYTES, LineReader, Settings, encode

HTTP_PROGRAM = ("-m", "deepseek_jax.serve.http_process")
READ_BYTES = 2**18
# A process that leaves so much unread, or says nothing for so long, is stuck: it is ended, and its requests with it.
MAX_PENDING_BYTES = 8 * MAX_LINE_BYTES
STUCK_SECONDS = 6 * ALIVE_SECONDS
END_SECONDS = 0.5  # for a process that closed the socket, before it is killed


class HttpChild:
  """A running HTTP process. The socket to it never blocks.

  Args:
    settings: its first message.
    listener: passed to it, listening.
  """

  def __init__(self, settings: Settings, listener: socket.socket):
    self._socket, other = socket.socketpair()
    self._lines, self._pending = LineReader(), bytearray()
    self.started = self._last_look = time.monotonic()
    self._silent_seconds: float | None = None  # None: it starts, and has said nothing yet
    command = [sys.executable, *HTTP_PROGRAM, str(other.fileno()), str(listener.fileno())]
    # A terminal's Ctrl-C goes to all processes of a session, and would end this one before its open requests.
    with other:
      self._process = subprocess.Popen(
        command, pass_fds=(other.fileno(), listener.fileno()), stdin=subprocess.DEVNULL, start_new_session=True
      )
    self._socket.setblocking(False)
    self.send(encode({"type": "settings", "settings": dataclasses.asdict(settings)}))

  def fileno(self) -> int:
    """Of the socket, for select."""
    return self._socket.fileno()

  @property
  def pid(self) -> int:
    """Of the process."""
    return self._process.pid

  @property
  def has_pending(self) -> bool:
    """Whether something waits to be sent."""
    return bool(self._pending)

  def send(self, line: bytes) -> None:
    """Sends `line` as far as the process reads, and keeps the rest. Raises ConnectionError where it is gone, or reads too little."""
    if len(self._pending) + len(line) > MAX_PENDING_BYTES:
      raise ConnectionAbortedError(f"it leaves more than {MAX_PENDING_BYTES} bytes unread")
    self._pending += line
    self.flush()

  def flush(self) -> None:
    """Sends what is kept, as far as the process reads. Raises ConnectionError where it is gone."""
    with contextlib.suppress(BlockingIOError):
      while self._pending:
        sent = self._socket.send(self._pending)
        del self._pending[:sent]

  def receive(self) -> list[dict[str, Any]]:
    """Messages that have come. Raises ConnectionError where the process is gone, and MessageError."""
    try:
      data = self._socket.recv(READ_BYTES)
    except BlockingIOError:
      return []
    if not data:
      raise ConnectionResetError("it closed the socket")
    self._silent_seconds = 0.0
    return self._lines.feed(data)

  def check_alive(self) -> None:
    """Raises ConnectionError once the process has said nothing for STUCK_SECONDS; to be called often, after `receive`.

    A long time between two calls counts little: then this process, or the machine, has slept.
    """
    now = time.monotonic()
    if self._silent_seconds is not None:
      self._silent_seconds += min(now - self._last_look, 2 * ALIVE_SECONDS)
    self._last_look = now
    if self._silent_seconds and self._silent_seconds > STUCK_SECONDS:
      raise ConnectionAbortedError(f"it has said nothing for {STUCK_SECONDS:.0f} s")

  def close(self) -> str:
    """Closes the socket and ends the process if it still runs; returns how it ended, in words."""
    self._socket.close()
    try:
      code = self._process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
      self._process.kill()
      code = self._process.wait()
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
