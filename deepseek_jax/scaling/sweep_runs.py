"""Runs a sweep: each run of a plan by the training loop, in WORKDIR/runs/RUN_ID, resumable at any point.

What has run is read from the runs' own folders. A run that another process trains is locked, and left to it.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from deepseek_jax.checkpoint.lock import lock_workdir
from deepseek_jax.console import LINE_SECONDS, Console, current_console, format_duration
from deepseek_jax.errors import CheckpointError, ConfigError, UserError, format_exception
from deepseek_jax.scaling.sweep_plan import PLAN_FILE, PlannedRun, SweepPlan, load_plan
from deepseek_jax.scaling.sweep_results import read_result, run_folder
from deepseek_jax.storage import ObjectStore, is_url

TERMINATED = 128 + signal.SIGTERM


def parse_shard(text: str) -> tuple[int, int]:
  """(index from 0, count) of --shard=i/n, with i from 1 to n, or from 0: i and n are taken modulo n. Raises ConfigError."""
  index, slash, count = text.partition("/")
  if not (slash and index.isdecimal() and count.isdecimal() and int(count) and int(index) <= int(count)):
    raise ConfigError(f"--shard={text}: expected i/n, such as 1/4 for the first of four parts")
  return int(index) % int(count), int(count)


def select_runs(plan: SweepPlan, budgets: Sequence[float], shard: tuple[int, int]) -> list[PlannedRun]:
  """The runs of a shard, small ones first; of `budgets` alone where there are any. Raises ConfigError."""
  known = {run.budget for run in plan.runs}
  if unknown := [b for b in budgets if b not in known]:
    have = ", ".join(f"{b:g}" for b in sorted(known))
    raise ConfigError(f"--budgets={unknown[0]:g} is not in the plan, which has {have}")
  index, count = shard
  chosen = [run for run in plan.runs if not budgets or run.budget in budgets]
  return chosen[index::count]


def order_for_worker(runs: Sequence[PlannedRun], worker: tuple[int, int], workdir: str) -> list[PlannedRun]:
  """The runs in the order of one of several workers: its own first. Locks keep the others' from it while they run.

  In a bucket, which has no locks, there are only its own.
  """
  index, count = worker
  own = list(runs[index::count])
  return own if is_url(workdir) else own + [run for run in runs if run not in own]


def open_sweep(plan_path: str | None, workdir: str) -> SweepPlan:
  """The plan of the sweep in `workdir`, which is copied there at the first start; without --plan the one there.

  Predictions may be added to a plan; its runs stay. Raises ConfigError.
  """
  known = _saved_plan(workdir)
  if not plan_path:
    if not known:
      raise ConfigError(f"{workdir} has no {PLAN_FILE}: name the plan of the sweep with --plan=FILE")
    return known
  plan = load_plan(plan_path)
  if known and not set(_by_id(known).items()) <= set(_by_id(plan).items()):
    raise ConfigError(
      f"--plan={plan_path} lacks runs of the plan that {workdir} was started with, or changes them: use another --workdir"
    )
  if known != plan:
    content = pathlib.Path(plan_path).read_bytes()
    if is_url(workdir):
      ObjectStore(workdir).write(PLAN_FILE, content)
    else:
      try:
        os.makedirs(workdir, exist_ok=True)
        plan.save(os.path.join(workdir, PLAN_FILE))
      except OSError as error:
        raise ConfigError(f"--workdir={workdir} cannot be made: {error.strerror}") from None
  return plan


def _by_id(plan: SweepPlan) -> dict[str, str]:
  return {run.run_id: json.dumps([plan.base, dataclasses.asdict(run)], sort_keys=True) for run in plan.runs}


def _saved_plan(workdir: str) -> SweepPlan | None:
  """The plan in `workdir`, or None."""
  if not is_url(workdir):
    path = os.path.join(workdir, PLAN_FILE)
    return load_plan(path) if os.path.isfile(path) else None
  content = ObjectStore(workdir).read(PLAN_FILE)
  if content is None:
    return None
  with tempfile.TemporaryDirectory(prefix="deepseek_jax-") as folder:
    path = os.path.join(folder, PLAN_FILE)
    pathlib.Path(path).write_bytes(content)
    return load_plan(path)


class SweepProgress:
  """Progress and time left of a sweep, by FLOPs: what is done over what was done since this process started.

  What other processes have finished is read from their runs' folders, so that the time left counts their work too.
  """

  def __init__(self, plan: SweepPlan, runs: Sequence[PlannedRun], workdir: str, console: Console):
    self.plan, self.runs, self.workdir, self.console = plan, runs, workdir, console
    self.total, self.start = sum(run.flops for run in runs), time.monotonic()
    self.finished: set[str] = set()
    self.done_at_start = self.refresh()

  def refresh(self) -> float:
    """Looks for runs that have finished since the last call. Returns the FLOPs of all that have."""
    for run in self.runs:
      if run.run_id not in self.finished and read_result(self.plan, run, self.workdir).status == "finished":
        self.finished.add(run.run_id)
    self.done = sum(run.flops for run in self.runs if run.run_id in self.finished)
    return self.done

  def line(self, run: PlannedRun, fraction: float, here: float, text: str) -> str:
    """What is shown while a run is at `fraction`, of which this process made `here`."""
    done, seconds = self.done + fraction * run.flops, time.monotonic() - self.start
    made = self.done - self.done_at_start + here * run.flops
    left = format_duration((self.total - done) / (made / seconds)) if made > 0 and seconds > 1 else "-:--:--"
    return f"sweep {done / self.total:6.1%}  {left} left  {run.run_id}: {text}"


class RunConsole(Console):
  """Shows of a run its progress as part of the sweep, and its errors."""

  def __init__(self, progress: SweepProgress, run: PlannedRun):
    super().__init__(bars=False)
    self.progress, self.run, self.last_line = progress, run, time.monotonic()

  def print(self, text: str, err: bool = False) -> None:
    """Shows nothing but errors: the run's report has the rest."""
    if err and "error" in text.lower():
      self.progress.console.print(f"{self.run.run_id}: {text}", err=True)

  @contextlib.contextmanager
  def step_progress(self, step: int, steps: int) -> Iterator[Callable[[int, str], None]]:
    """Shows a line of the sweep every LINE_SECONDS."""

    def update(completed: int, text: str) -> None:
      now = time.monotonic()
      if now - self.last_line >= LINE_SECONDS:
        self.last_line = now
        line = self.progress.line(
          self.run, completed / steps, (completed - step) / steps, f"step {completed}/{steps}  {text}"
        )
        self.progress.console.print(line)

    yield update


def run_sweep(
  plan: SweepPlan,
  workdir: str,
  runs: Sequence[PlannedRun],
  train: Callable[..., int],
  max_minutes: float = 0.0,
  console: Console | None = None,
) -> int:
  """Runs those of `runs` that have not finished, one after the other. Returns the exit code.

  Args:
    train: `deepseek_jax.train.train`.
    max_minutes: after them the run in progress is saved and the sweep stops; 0: no limit.

  Exit codes: 0 all have finished, or the time is up; 1 a run has failed; 130 and 143 as those of training.
  """
  console = console or current_console()
  deadline = Deadline(max_minutes)
  progress = SweepProgress(plan, runs, workdir, console)
  failed, busy, stopped = [], [], TERMINATED
  with deadline:
    for run in runs:
      progress.refresh()
      if run.run_id in progress.finished:
        continue
      if deadline.signalled or deadline.is_over():
        break
      result = read_result(plan, run, workdir)
      if result.status == "failed" and result.reason == "diverged":
        failed.append((run, result.reason))
        continue
      code, reason = _run_one(plan, run, workdir, train, progress)
      if code in (TERMINATED, 128 + signal.SIGINT):
        deadline.signalled = True
        stopped = code
        break
      if reason == "busy":
        busy.append(run)
      elif reason:
        failed.append((run, reason))
        console.print(f"{run.run_id}: failed: {reason}", err=True)
  progress.refresh()
  busy = [run for run in busy if run.run_id not in progress.finished]
  for line in _summary(progress, failed, busy):
    console.print(line)
  if deadline.signalled or (deadline.is_over() and len(progress.finished) < len(runs)):
    console.print("the time is up" if deadline.is_over() else "stopped", err=not deadline.is_over())
    console.print("the same command continues from there")
    if not deadline.is_over():
      return stopped
  return 1 if failed else 0


def _run_one(
  plan: SweepPlan, run: PlannedRun, workdir: str, train: Callable[..., int], progress: SweepProgress
) -> tuple[int, str]:
  """Runs or resumes one run. Returns (exit code, reason of a failure; "busy": another process trains it)."""
  from deepseek_jax.training.skipped import Diverged

  folder = run_folder(workdir, run)
  if not is_url(folder) and _is_locked(folder):
    return 0, "busy"
  start = time.monotonic()
  try:
    code = train(plan.config(run), folder, selftest=False, console=RunConsole(progress, run))
  except Diverged:
    return 1, "diverged"
  except CheckpointError as error:
    # It may have taken the lock since.
    return (0, "busy") if not is_url(folder) and _is_locked(folder) else (1, str(error))
  except Exception as error:  # whatever one run does, the others go on
    return 1, str(error) if isinstance(error, UserError) else format_exception(error)
  if code:
    return code, "" if code >= 128 else f"exit code {code}"
  result = read_result(plan, run, workdir)
  if result.status != "finished":
    return 1, f"it ended as {result.status}"
  progress.refresh()
  text = f"{result.values['val_bpb']:.4f} bits per byte, {format_duration(time.monotonic() - start)}"
  progress.console.print(f"run {len(progress.finished)}/{len(progress.runs)}  {progress.line(run, 0.0, 0.0, text)}")
  return 0, ""


def _is_locked(folder: str) -> bool:
  """Whether another process trains in `folder`."""
  checkpoints = pathlib.Path(folder, "checkpoints")
  if not checkpoints.is_dir():
    return False
  try:
    lock_workdir(checkpoints).close()
  except CheckpointError:
    return True
  return False


def _summary(
  progress: SweepProgress, failed: Sequence[tuple[PlannedRun, str]], busy: Sequence[PlannedRun]
) -> Iterator[str]:
  yield f"{len(progress.finished)} of {len(progress.runs)} runs have finished"
  if failed:
    yield f"{len(failed)} failed:"
    yield from (f"  {run.run_id}: {reason}" for run, reason in failed)
  if busy:
    yield f"{len(busy)} are in progress in other processes: {', '.join(run.run_id for run in busy)}"


class Deadline:
  """Sends SIGTERM to this process when its minutes are over, while the block lasts: a run saves and ends then.

  Between runs the signal is noted in `signalled`, whoever sent it, and sent again each second: a run that starts at that moment
  has not seen it. In another thread than the main one, where Python allows no handlers, the minutes count between runs alone.
  """

  def __init__(self, minutes: float):
    self.end = time.monotonic() + 60 * minutes if minutes else float("inf")
    self.signalled = False
    self._wake, self._lock, self._has_ended = threading.Event(), threading.Lock(), False

  def is_over(self) -> bool:
    """Whether the time is up."""
    return time.monotonic() >= self.end

  def __enter__(self) -> "Deadline":
    def note(number: int, frame: Any) -> None:
      self.signalled = True
      self._wake.set()

    self._handles = threading.current_thread() is threading.main_thread()
    if self._handles:
      self._previous = signal.signal(signal.SIGTERM, note)
      threading.Thread(target=self._send, daemon=True).start()
    return self

  def _send(self) -> None:
    """Waits for the end of the time, or for a signal that was noted, and sends SIGTERM until the block has ended."""
    self._wake.wait(None if self.end == float("inf") else max(0.0, self.end - time.monotonic()))
    while True:
      with self._lock:
        if self._has_ended:
          return
        os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(1.0)

  def __exit__(self, *exception: Any) -> None:
    with self._lock:
      self._has_ended = True
    self._wake.set()
    if self._handles:
      signal.signal(signal.SIGTERM, self._previous)


def run_workers(workers: int, argv: Sequence[str]) -> int:
  """Runs the command `argv` in several processes at once, which share the sweep's runs by their locks.

  Each gets its share of the cores. Returns the largest of their exit codes.
  """
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  environment = {**os.environ, "NPROC": str(max(1, cores // workers))}
  command = [sys.executable, "-m", "deepseek_jax.scaling", *argv]
  processes: list[subprocess.Popen] = []

  def stop(number: int, frame: Any) -> None:
    for process in processes:
      process.send_signal(number)

  # Ctrl-C reaches the workers from the terminal; this process waits until they have saved.
  handlers: dict[int, Any] = {signal.SIGTERM: stop, signal.SIGINT: signal.SIG_IGN}
  previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
  try:
    for i in range(workers):
      processes.append(subprocess.Popen([*command, f"--worker={i}/{workers}"], env=environment))
    return max(process.wait() % 256 for process in processes)
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
