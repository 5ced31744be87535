"""Ctrl-C and SIGTERM as a flag that the loop reads between steps."""

import contextlib
import signal
import types

import jax


@contextlib.contextmanager
def stop_requests():
  """Yields an object whose `.received` is None until SIGINT or SIGTERM comes. A second SIGINT interrupts at once.

  `.signal` is what to stop for: of a process alone what it received, of several what the loop makes them agree on.
  """
  request, alone = types.SimpleNamespace(received=None, signal=None), jax.process_count() == 1

  def handle(number, frame):
    if request.received is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    request.received = signal.Signals(number)
    if alone:
      request.signal = request.received

  previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield request
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
