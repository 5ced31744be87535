"""SIGINT (Ctrl-C) and SIGTERM as a flag that the loop reads between steps."""

import contextlib
import dataclasses
import signal
from collections.abc import Iterator

import jax


@dataclasses.dataclass
class StopRequest:
  """Whether to stop, and by which signal."""

  received: signal.Signals | None = None  # by this process
  stop_signal: signal.Signals | None = (
    None  # to stop for; with several processes the loop sets it at the same step on all
  )


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
  """Handles SIGINT and SIGTERM while the block lasts. A second SIGINT raises KeyboardInterrupt at once."""
  request, single_process = StopRequest(), jax.process_count() == 1

  def handle(number, frame):
    if request.received is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    request.received = signal.Signals(number)
    if single_process:
      request.stop_signal = request.received

  previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield request
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
