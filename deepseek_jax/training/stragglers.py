"""Stragglers: which process holds the others up.

In lock-step all processes have the same step time: who is early waits in the step for who is late. What differs is the
host time: what a process does by itself in a step, waiting for its data, Python, dispatch, and not waiting for its device.
Processes share it through the coordinator's key-value store, which takes no device. A slow chip is not seen: all wait
for it alike.
"""

import concurrent.futures
import dataclasses
import statistics
from collections.abc import Mapping

import jax

from deepseek_jax.console import Console
from deepseek_jax.distributed import process_count, share, shared
from deepseek_jax.training.clock import STEP_PHASES, PhaseClock

SLOW_FACTOR = 1.5  # of the median host time of the other processes
# What it takes more than that median: this fraction of the step time, and this many seconds, which in a tiny step are
# what process 0 writes.
SLOW_FRACTION, SLOW_SECONDS = 0.1, 0.05
LASTING = 3  # lines of metrics in a row
SLOTS = 4  # lines whose host times are kept: process 0 reads those of a line when the others may have shared newer ones


@dataclasses.dataclass(frozen=True)
class HostTimes:
  """Host times of a step.

  seconds: {process: seconds}. step_seconds: the step time on process 0.
  """

  seconds: Mapping[int, float]
  step_seconds: float

  @property
  def slowest(self) -> int:
    """The process with the largest host time."""
    return max(self.seconds, key=lambda process: self.seconds[process])

  @property
  def others_median(self) -> float:
    """Of the processes but the slowest."""
    return statistics.median(value for process, value in self.seconds.items() if process != self.slowest)

  @property
  def is_uneven(self) -> bool:
    """Whether the slowest process is a straggler in this interval."""
    largest, usual = self.seconds[self.slowest], self.others_median
    least = max(SLOW_FRACTION * self.step_seconds, SLOW_SECONDS)
    return largest > SLOW_FACTOR * usual and largest - usual > least


class Stragglers:
  """Shares this process's host times; on process 0 also finds the slowest process. In a single process it does nothing.

  Args:
    clock: of the run.
    console: for the line that names a process, when it is first seen to be slow in LASTING lines in a row.
  """

  def __init__(self, clock: PhaseClock, console: Console):
    self._clock, self._console, self._is_alone = clock, console, process_count() == 1
    self._sender = concurrent.futures.ThreadPoolExecutor(1, "host-times")  # its thread starts with the first line
    self._start(clock.step)
    self._lines = 0
    self._newest: tuple[str, int, float] | None = None  # (name of the slot, step, step time) of the line before
    self._in_a_row: tuple[int, int] = (-1, 0)  # (process, lines in which it was slow)
    self._named = -1

  def start_interval(self) -> None:
    """Leaves out what was before, as the first step of a program."""
    self._start(self._clock.step)

  def share(self) -> tuple[str, int, float] | None:
    """Starts to share the host time of a step since the last call, and returns the arguments of `metrics` for the call before.

    Returns None where that is not known. What cannot be sent is missed in one line: without its coordinator a run ends.
    """
    if self._is_alone or self._clock.step == self._first_step:
      return None
    steps, seconds = self._clock.step - self._first_step, self._clock.seconds()
    data, host, device = ((seconds[phase] - self._first_seconds[phase]) / steps for phase in STEP_PHASES)
    slot, self._lines = f"host_seconds_{self._lines % SLOTS}", self._lines + 1
    self._sender.submit(share, slot, [self._clock.step, data + host])
    before, self._newest = self._newest, (slot, self._clock.step, data + host + device)
    self._start(self._clock.step)
    return before

  def metrics(self, slot: str, step: int, step_seconds: float) -> dict[str, float]:
    """Metrics of the interval that ended with `step`, once all processes have shared theirs in `slot`; called on process 0.

    host_seconds_max and host_seconds_median over processes, slowest_process, and straggler, the number of a process
    that was slow in LASTING lines in a row. {} where not all are there.
    """
    try:
      newest = shared(slot)
    except jax.errors.JaxRuntimeError:  # no reason to end a run
      return {}
    seconds = {process: value for process, (at, value) in newest.items() if at == step}
    if len(seconds) < process_count():
      return {}
    times = HostTimes(seconds, step_seconds)
    slowest = times.slowest
    values = {
      "host_seconds_max": seconds[slowest],
      "host_seconds_median": statistics.median(seconds.values()),
      "slowest_process": slowest,
    }
    lines = self._in_a_row[1] + 1 if self._in_a_row[0] == slowest else 1
    self._in_a_row = (slowest, lines) if times.is_uneven else (-1, 0)
    if self._in_a_row[1] < LASTING:
      return values
    if slowest != self._named:
      self._named = slowest
      self._console.print(
        f"step {step}: process {slowest} holds the others up: {seconds[slowest]:.3g} s of its own in a step of "
        f"{step_seconds:.3g} s, the others {times.others_median:.3g} s (data, Python)"
      )
    return values | {"straggler": slowest}

  def close(self) -> None:
    """Ends the thread; what it sends is not waited for."""
    self._sender.shutdown(wait=False, cancel_futures=True)

  def _start(self, step: int) -> None:
    self._first_step, self._first_seconds = step, self._clock.seconds()
