"""Which phase a run is in. One clock, always in exactly one phase: throughput, goodput, stragglers and the watchdog read it."""

import collections
import contextlib
import os
import time
from collections.abc import Callable, Iterator

# What a run does at a time; the watchdog has a limit for each, and goodput a category.
PHASES = (
  "init",  # imports, devices, self-test, and all that follows the last step beside the phases below
  "open_data",
  "compile",  # of the step
  "restore",  # a checkpoint or given weights, or new parameters
  "data",  # waiting for the next batch
  "step",  # the host's part of a step: dispatch, logging
  "device",  # waiting for the device, and so for the other processes
  "check",  # of the devices, for silent corruption
  "eval",
  "checkpoint",  # the blocking part of a save
  "sample",
)
STEP_PHASES = ("data", "step", "device")  # between one finished step and the next
RECENT_STEPS = 64


class PhaseClock:
  """The phase that a run is in, and the seconds of each phase so far. They add up to the time since `started`.

  Only the thread of the loop changes the phase; any thread may read its attributes.

  Args:
    started: when the run began, in time.monotonic(). None: now.

  Attributes:
    started: as above.
    current: (phase, the last sign of progress in it, in time.monotonic()).
    step: completed updates.
    step_seconds: of the newest steps of the compiled program, at most RECENT_STEPS.
    listener: called with (phase, start, end) when a phase is left, or interrupted by another.
  """

  def __init__(self, started: float | None = None):
    now = time.monotonic()
    self.started = self._entered = now if started is None else started
    self.current = (PHASES[0], now)
    self.step = 0
    self.step_seconds: collections.deque[float] = collections.deque(maxlen=RECENT_STEPS)
    self.listener: Callable[[str, float, float], None] = lambda phase, start, end: None
    self._seconds = dict.fromkeys(PHASES, 0.0)
    self._at_last_step = 0.0

  @contextlib.contextmanager
  def measure(self, phase: str) -> Iterator[None]:
    """Is in `phase` during the block, and then again in the phase before it."""
    outer = self.current[0]
    self._enter(phase)
    try:
      yield
    finally:
      self._enter(outer)

  def tick(self) -> None:
    """Says that a long phase makes progress, so that the watchdog's limit counts from here."""
    self.current = (self.current[0], time.monotonic())

  def finish_step(self, step: int) -> None:
    """Notes that `step` updates are completed, and how long the last one took without what else a run does."""
    self.step = step
    seconds = self.seconds()
    total = sum(seconds[phase] for phase in STEP_PHASES)
    self.step_seconds.append(total - self._at_last_step)
    self._at_last_step = total

  def seconds(self) -> dict[str, float]:
    """{phase: seconds in it until now}."""
    phase, running = self.current[0], time.monotonic() - self._entered
    return self._seconds | {phase: self._seconds[phase] + running}

  def _enter(self, phase: str) -> None:
    left, now = self.current[0], time.monotonic()
    self._seconds[left] += now - self._entered
    self.listener(left, self._entered, now)
    self._entered, self.current = now, (phase, now)
    if left == "compile":  # the steps of another program may take another time
      self.step_seconds.clear()
      self._at_last_step = sum(self._seconds[name] for name in STEP_PHASES)


def process_start() -> float:
  """When this process started, in time.monotonic(); now where the system does not tell."""
  try:
    with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
      ticks = int(file.read().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
  except (OSError, AttributeError, IndexError, ValueError):  # not Linux
    age = 0.0
  return time.monotonic() - max(age, 0.0)
