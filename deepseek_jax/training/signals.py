"""Notices that end a run: Ctrl-C, SIGTERM, Slurm's SIGUSR1, and those of `preemption.py`.

A run with updates to save stops between steps; before and after that it ends at once.
"""

import _thread
import contextlib
import dataclasses
import enum
import signal
import threading
from collections.abc import Iterator

from deepseek_jax.distributed import process_count, process_index
from deepseek_jax.errors import Stopped

_MAX_PROCESSES = 1 << 20


class Notice(enum.IntEnum):
  """What ends a run before its last step. Of several that come to several processes in one step, the greatest counts.

  The name is the `reason` in the event of the end.
  """

  SIGINT = 1  # Ctrl-C
  SIGUSR1 = 2  # of Slurm's --signal=USR1@SECONDS
  SIGTERM = 3  # of schedulers, Kubernetes, and a machine that shuts down
  MAINTENANCE = 4  # Google Cloud will end the machine for maintenance of its host
  PREEMPTED = 5  # Google Cloud takes the machine away

  @property
  def exit_code(self) -> int:
    """As of a process that SIGINT ends, or else SIGTERM, by which supervisors know a preemption."""
    return 130 if self is Notice.SIGINT else 143

  @property
  def words(self) -> str:
    """For people."""
    return {
      Notice.MAINTENANCE: "Google Cloud's notice of host maintenance",
      Notice.PREEMPTED: "Google Cloud's notice of preemption",
    }.get(self, self.name)


_OF_SIGNALS = {signal.SIGINT: Notice.SIGINT, signal.SIGUSR1: Notice.SIGUSR1, signal.SIGTERM: Notice.SIGTERM}


@dataclasses.dataclass
class StopRequest:
  """Whether to stop, and what for."""

  received: Notice | None = None  # the first that came to this process; later ones change nothing
  # To stop for; with several processes the loop sets it at the same step on all.
  stop: Notice | None = None
  stop_process: int = 0  # the process that received it
  at_once: bool = False  # a signal raises Stopped where it comes, else it is only noted

  def receive(self, notice: Notice) -> None:
    """Notes `notice`, in any thread. A run of one process stops for it."""
    if self.received is None:
      self.received = notice
      if process_count() == 1:
        self.stop = notice

  def announce(self, notice: Notice) -> None:
    """As `receive`, for a notice that is no signal: raises Stopped in the main thread while `at_once` is true."""
    self.receive(notice)
    _thread.interrupt_main(signal.SIGUSR1)  # runs the handler of `stop_requests`; nothing where there is none

  def encode(self) -> int:
    """`received` and this process as an int32, 0 without. `decode` takes the maximum over processes."""
    return self.received * _MAX_PROCESSES + process_index() if self.received else 0

  def decode(self, code: int) -> None:
    """Sets `stop` and `stop_process`, unless `code` is 0 or they are set."""
    if code and not self.stop:
      self.stop, self.stop_process = Notice(code // _MAX_PROCESSES), code % _MAX_PROCESSES

  def cause(self) -> str:
    """What `stop` is, and the process that received it where there are several."""
    assert self.stop
    return self.stop.words + (f" to process {self.stop_process}" if process_count() > 1 else "")

  def stopped(self) -> Stopped:
    """The exception for `stop`, or for `received` in a process that does not wait for the others."""
    notice = self.stop or self.received
    assert notice
    return Stopped(notice.name, notice.exit_code)

  def stop_at_once_from_now(self) -> None:
    """Sets `at_once`. Raises Stopped if a notice has come already."""
    self.at_once = True
    if self.received:
      self.at_once = False
      raise self.stopped()

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
  """Handles SIGINT, SIGTERM and SIGUSR1 while the block lasts, in a program's main thread.

  In the block the first raises Stopped while `at_once` is true. A second SIGINT raises KeyboardInterrupt in any case.
  """
  request, interrupted = StopRequest(), False

  def handle(number, frame):
    nonlocal interrupted
    if interrupted and number == signal.SIGINT:
      raise KeyboardInterrupt
    interrupted |= number == signal.SIGINT
    request.receive(_OF_SIGNALS[number])
    if request.at_once:
      request.at_once = False
      raise request.stopped()

  if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
    yield request
    return
  previous = {number: signal.signal(number, handle) for number in _OF_SIGNALS}
  try:
    yield request
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
