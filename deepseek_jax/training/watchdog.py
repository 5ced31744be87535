"""The hang watchdog: a thread of each process that ends a run in which nothing goes on, with the stacks of all processes.

It counts the time in which it runs itself. So a laptop that slept, a process that was stopped and a clock that was set
do not count, and a process that is starved of CPU time is given more.
"""

import contextlib
import datetime
import faulthandler
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from deepseek_jax.config_sections import WatchdogConfig
from deepseek_jax.console import Console
from deepseek_jax.distributed import (
  HANG_EXIT_CODE,
  audible,
  before_exit,
  exit_process,
  print_error,
  process_count,
  process_index,
  share,
  shared,
  tell_failure,
)
from deepseek_jax.storage import RunFolder
from deepseek_jax.training.clock import STEP_PHASES, PhaseClock

Result = TypeVar("Result")
HANGS = "hangs"  # folder of the stacks
STEP_FACTOR = 10  # of the median step
FEWEST_STEPS = 3  # that give a median; before, the limit of the compilation holds
POLL_SECONDS = 1.0
# At the end of a hang the disk, the bucket or the coordinator may hang as well. Seconds for each: to write the stacks;
# to write the last event and the report, and to upload; for the other processes to do the same; for all of it.
STACKS_SECONDS, PUBLISH_SECONDS, OTHERS_SECONDS, EXIT_SECONDS = 5.0, 15.0, 20.0, 45.0
# Without any Python thread running for so long, as where a native function hangs and holds the interpreter's lock, the
# interpreter's own timer shows the stacks and ends the process, with exit code 1.
FROZEN_SECONDS = 1200.0
# {phase: what a process does in it}, for the line that says who hangs.
WORDS = {
  "init": "starting or ending",
  "open_data": "opening the data",
  "compile": "compiling the step",
  "restore": "restoring a checkpoint, or making the first state",
  "data": "waiting for the next batch",
  "step": "preparing or logging a step",
  "device": "waiting for the device, or there for another process",
  "check": "checking the devices",
  "eval": "evaluating",
  "checkpoint": "saving a checkpoint",
  "sample": "sampling",
}


class Watchdog:
  """Watches `clock` from a thread. A hang ends this process, and all others of the run, with HANG_EXIT_CODE.

  Args:
    config: the limits.
    clock: of the run.
    run_folder: the local folder of the run's small files, to which the stacks go.
    console: for the line that says what hangs. On others than process 0 it is silent, and the line goes to stderr.

  Attributes:
    publish: writes the end of the run to its files, given (completed updates, what hangs), and uploads them. Until it is
      set the stacks alone are uploaded.
  """

  def __init__(
    self,
    config: WatchdogConfig,
    clock: PhaseClock,
    run_folder: RunFolder,
    console: Console,
  ):
    self._config, self._clock, self._folder, self._console = config, clock, run_folder.path, console
    self.publish: Callable[[int, str], None] = lambda step, what: run_folder.upload()
    self._loop_thread = threading.current_thread()
    self._stopped, self._has_fired = threading.Event(), threading.Lock()

  @contextlib.contextmanager
  def watch(self) -> Iterator[None]:
    """Watches during the block, in which the thread that made this is the loop's."""
    if not self._config.step_seconds:
      yield
      return
    thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
    with before_exit(self._join_hang):
      thread.start()
      try:
        yield
      finally:
        self._stopped.set()
        if not self._has_fired.acquire(blocking=False):
          threading.Event().wait()  # another thread ends this process; what the loop raises meanwhile follows from that
        thread.join()
        faulthandler.cancel_dump_traceback_later()

  def limit(self, phase: str) -> float:
    """Seconds without progress in `phase` that make a hang."""
    if phase in STEP_PHASES:
      steps = list(self._clock.step_seconds)
      if len(steps) < FEWEST_STEPS:
        return max(self._config.compile_seconds, self._config.step_seconds)
      return max(STEP_FACTOR * statistics.median(steps), self._config.step_seconds)
    field = {"init": "start", "open_data": "data", "check": "compile", "sample": "eval"}.get(phase, phase)
    return getattr(self._config, f"{field}_seconds")

  def _run(self) -> None:
    poll = min(POLL_SECONDS, self._config.step_seconds / 10)
    seen, still, last = self._clock.current, 0.0, time.monotonic()
    while not self._stopped.wait(poll):
      faulthandler.dump_traceback_later(FROZEN_SECONDS, exit=True, file=2)
      now, current = time.monotonic(), self._clock.current
      # More than asked for is time in which the process, or the machine, did not run.
      still = still + min(now - last, 2 * poll) if current == seen else 0.0
      seen, last = current, now
      if still > self.limit(current[0]) and not is_traced(self._loop_thread):
        self._fire(current[0], still)

  def _fire(self, phase: str, still: float) -> None:
    """Ends all processes, after all have written their stacks."""
    if not self._has_fired.acquire(blocking=False):
      return  # another thread ends this process, as another one has failed
    what = (
      f"hang: no progress for {still:.3g} s, limit {self.limit(phase):.3g} s, after step {self._clock.step:,}: "
      f"{WORDS[phase]}"
    )
    try:
      _exit_later()
      path = self._save_stacks(what)
      self._show(f"error: {what}; the stacks of every process: {path}")
      tell_failure(HANG_EXIT_CODE, what)
      self._publish_and_wait(phase, what)
    finally:
      exit_process(HANG_EXIT_CODE)

  def _join_hang(self, code: int) -> None:
    """Before the failure of another process ends this one: where that is a hang, this one's stacks tell as much."""
    if code != HANG_EXIT_CODE:
      return
    if not self._has_fired.acquire(blocking=False):
      threading.Event().wait()  # the watchdog's thread ends this process
    phase, since = self._clock.current
    what = f"hang, reported by another process; this one for {time.monotonic() - since:.3g} s, after step {self._clock.step:,}: {WORDS[phase]}"
    _exit_later()
    self._save_stacks(what)
    self._publish_and_wait(phase, what)

  def _publish_and_wait(self, phase: str, what: str) -> None:
    """Publishes, waits until the other processes have, and says who hangs."""
    deadline = time.monotonic() + OTHERS_SECONDS
    _within(PUBLISH_SECONDS, lambda: self.publish(self._clock.step, what))
    if process_count() == 1:
      return
    share("hang", phase)
    while len(phases := shared("hang")) < process_count() and time.monotonic() < deadline:
      time.sleep(0.1)
    if process_index() == 0:
      self._show(f"hang: {describe_processes(phases, process_count())}. The same command resumes")

  def _show(self, text: str) -> None:
    print_error(text, audible(self._console))

  def _save_stacks(self, what: str) -> str:
    """Writes the stacks of all threads, and returns the file's path; to stderr where the disk takes too long."""
    now = datetime.datetime.now(datetime.UTC)
    head = f"{what}\n{now:%Y-%m-%d %H:%M:%S} UTC, host {socket.gethostname()}, process id {os.getpid()}\n"
    text = head + format_stacks(self._loop_thread)
    path = os.path.join(self._folder, HANGS, f"{now:%Y%m%dT%H%M%SZ}.process_{process_index()}.txt")

    def write() -> str:
      os.makedirs(os.path.dirname(path), exist_ok=True)
      with open(path, "w", encoding="utf-8", errors="replace") as file:
        file.write(text)
      return path

    if _within(STACKS_SECONDS, write) is None:
      self._show(text)
      return "above"
    return path


def _exit_later() -> None:
  """Ends this process after EXIT_SECONDS, whatever its end waits for."""
  timer = threading.Timer(EXIT_SECONDS, os._exit, [HANG_EXIT_CODE])
  timer.daemon = True
  timer.start()


def _within(seconds: float, function: Callable[[], Result]) -> Result | None:
  """What `function` returns, called in a thread; None where it takes longer, or raises."""
  results: list[Result] = []

  def call() -> None:
    with contextlib.suppress(Exception):  # the hang is the error that is told
      results.append(function())

  thread = threading.Thread(target=call, daemon=True)
  thread.start()
  thread.join(seconds)
  return results[0] if results else None


def format_stacks(loop_thread: threading.Thread) -> str:
  """The Python stacks of all threads of this process, newest call last; that of the loop first."""
  names: dict[int | None, str] = {thread.ident: thread.name for thread in threading.enumerate()}
  frames = sys._current_frames()
  order = sorted(frames, key=lambda ident: ident != loop_thread.ident)
  texts = []
  for ident in order:
    loop = " (the loop of the run)" if ident == loop_thread.ident else ""
    stack = "".join(traceback.format_stack(frames[ident]))
    texts.append(f"\nthread {ident} {names.get(ident, 'of native code')}{loop}\n{stack}")
  return "".join(texts)


def is_traced(thread: threading.Thread) -> bool:
  """Whether a debugger or another tracer of Python's `sys.settrace` has `thread`."""
  frame = sys._current_frames().get(thread.ident or 0)
  while frame:
    if frame.f_trace:
      return True
    frame = frame.f_back
  return False


def describe_processes(phases: dict[int, Any], count: int) -> str:
  """Who hangs, in words: processes by what they do; those that wait for others last.

  Args:
    phases: {process: its phase}, of the processes that could tell.
    count: processes of the run.
  """
  by_phase: dict[str, list[int]] = {}
  for process, phase in sorted(phases.items()):
    by_phase.setdefault(phase, []).append(process)
  texts = [
    f"{_name_processes(by_phase[phase])}: {WORDS[phase]}"
    for phase in sorted(by_phase, key=lambda phase: (phase == "device", phase))
  ]
  if silent := [process for process in range(count) if process not in phases]:
    texts.append(f"{_name_processes(silent)}: no answer")
  return "; ".join(texts)


def _name_processes(processes: list[int]) -> str:
  listed = ", ".join(map(str, processes[:8])) + (f" and {len(processes) - 8} more" if len(processes) > 8 else "")
  return f"process{'es' if len(processes) > 1 else ''} {listed}"
