"""SIGINT (Ctrl-C) and SIGTERM: a run with updates to save stops between steps; before and after that it ends at once."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator

from deepseek_jax.distributed import process_count
from deepseek_jax.errors import Stopped


@dataclasses.dataclass
class StopRequest:
  """Whether to stop, and by which signal."""

  received: signal.Signals | None = None  # by this process
  # To stop for; with several processes the loop sets it at the same step on all.
  stop_signal: signal.Signals | None = None
  at_once: bool = True  # a signal raises Stopped where it comes, else it is only noted

  @contextlib.contextmanager
  def stop_at_once(self, at_once: bool) -> Iterator[None]:
    """Sets `at_once` during the block; after it a signal is only noted."""
    self.at_once = at_once
    try:
      yield
    finally:
      self.at_once = False


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
  """Handles SIGINT and SIGTERM while the block lasts, in a program's main thread.

  In the block they raise Stopped while `at_once` is true. A second SIGINT raises KeyboardInterrupt in any case.
  """
  request, single_process = StopRequest(), process_count() == 1

  def handle(number, frame):
    if request.received is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    request.received = signal.Signals(number)
    if single_process:
      request.stop_signal = request.received
    if request.at_once:
      raise Stopped(number)

  if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
    yield request
    return
  previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield request
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
