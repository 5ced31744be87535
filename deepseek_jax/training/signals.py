"""Ctrl-C and SIGTERM as a flag that the loop reads between steps."""

import contextlib
import signal
import types


@contextlib.contextmanager
def stop_requests():
  """Yields an object whose `.signal` is None until SIGINT or SIGTERM comes. A second SIGINT interrupts at once."""
  request = types.SimpleNamespace(signal=None)

  def handle(number, frame):
    if request.signal is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    request.signal = signal.Signals(number)

  previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield request
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
