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
from deepseek_jax.flags import load_config
from deepseek_jax.scaling.sweep_plan import PlannedRun, SweepPlan, load_plan
from deepseek_jax.storage import ObjectStore, is_url
from deepseek_jax.training import metrics

PLAN_FILE = "plan.json"
TERMINATED = 128 + signal.SIGTERM


@dataclasses.dataclass(frozen=True)
class RunResult:
  """What is known of a run.

  Attributes:
    status: "finished", "failed", "stopped", or "not started".
    values: columns of the table that the run itself gives: val_loss, val_bpb, unique_tokens, seconds.
    reason: of a failure.
    step: completed updates, as far as they are logged.
  """

  status: str
  values: dict[str, float | int]
  reason: str = ""
  step: int = 0


def read_result(plan: SweepPlan, run: PlannedRun, workdir: str) -> RunResult:
  """The result of a run, from its files. Raises ConfigError where the run there is not the one that is planned."""
  with _local_copy(run_folder(workdir, run)) as folder:
    events = metrics.read_jsonl(folder / metrics.EVENTS)
    if not events:
      return RunResult("not started", {})
    saved = load_config(str(folder / "config.json"), saved=True)
    lines = metrics.read_jsonl(folder / metrics.METRICS)
  if saved != plan.config(run):
    raise ConfigError(
      f"{run_folder(workdir, run)} has a run of another config than the plan's {run.run_id}: use another --workdir, or the "
      f"plan that it was started with, {os.path.join(workdir, PLAN_FILE)}"
    )
  seconds = sum(line.get("step_seconds", 0.0) + line.get("data_seconds", 0.0) for line in lines)
  values: dict[str, float | int] = {"seconds": round(seconds, 3)}
  if unique := [e["unique_tokens"] for e in events if "unique_tokens" in e]:
    values["unique_tokens"] = unique[-1]
  final = [e for e in events if e["event"] == "eval" and e["step"] == run.steps]
  end = next((e for e in reversed(events) if e["event"] in metrics.PROCESS_EVENTS), events[-1])
  step = lines[-1]["step"] if lines else 0
  if end["event"] == "end" and end.get("reason") == "finished" and final:
    values |= {"val_loss": final[-1]["loss"], "val_bpb": final[-1]["bits_per_byte"]}
    return RunResult("finished", values, step=run.steps)
  if end["event"] == "end" and end.get("reason") in ("diverged", "failed"):
    return RunResult("failed", values, str(end.get("error") or end["reason"]), step)
  return RunResult("stopped", values, step=step)


@contextlib.contextmanager
def _local_copy(folder: str) -> Iterator[pathlib.Path]:
  """The folder of a run, or a temporary one with its small files where it is in a bucket."""
  if not is_url(folder):
    yield pathlib.Path(folder)
    return
  store = ObjectStore(folder)
  with tempfile.TemporaryDirectory(prefix="deepseek_jax-") as copy:
    for name in (metrics.METRICS, metrics.EVENTS, "config.json"):
      if (content := store.read(name)) is not None:
        pathlib.Path(copy, name).write_bytes(content)
    yield pathlib.Path(copy)


def run_folder(workdir: str, run: PlannedRun) -> str:
  """The workdir of a run: a folder or a URL."""
  return f"{workdir.rstrip('/')}/runs/{run.run_id}"


def table_rows(plan: SweepPlan, workdir: str) -> list[dict[str, Any]]:
  """The rows of the table of a sweep, those of runs that have not finished included."""
  rows = []
  for run in plan.runs:
    result = read_result(plan, run, workdir)
    rows.append({**dataclasses.asdict(run), "status": result.status, **result.values})
  return rows


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


def status_lines(plan: SweepPlan, runs: Sequence[PlannedRun], workdir: str) -> Iterator[str]:
  """A line for each run: its FLOPs, and how far it is."""
  for run in runs:
    result = read_result(plan, run, workdir)
    detail = result.reason or f"step {result.step:,} of {run.steps:,}"
    yield f"{run.run_id:32}  {run.flops:.3g} FLOPs  {result.status:12} {detail}"


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
  """Progress and time left of a sweep, by FLOPs: what is done now over what this process has done since its start."""

  def __init__(self, plan: SweepPlan, runs: Sequence[PlannedRun], console: Console):
    self.plan, self.console, self.total = plan, console, sum(run.flops for run in runs)
    self.count, self.done, self.finished = len(runs), 0.0, 0
    self.start, self.flops_here = time.monotonic(), 0.0

  def add_finished(self, run: PlannedRun, here: float) -> None:
    """Counts a run as done, of which this process made the fraction `here`."""
    self.done, self.finished = self.done + run.flops, self.finished + 1
    self.flops_here += here * run.flops

  def line(self, run: PlannedRun, fraction: float, here: float, text: str) -> str:
    """What is shown while a run is at `fraction`, of which this process made `here`."""
    done = self.done + fraction * run.flops
    made, seconds = self.flops_here + here * run.flops, time.monotonic() - self.start
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
  progress = SweepProgress(plan, runs, console)
  failed, busy, stopped = [], [], TERMINATED
  with deadline:
    for run in runs:
      result = read_result(plan, run, workdir)
      if result.status == "finished":
        progress.add_finished(run, 0.0)
        continue
      if deadline.signalled:
        break
      if result.status == "failed" and result.reason == "diverged":
        failed.append((run, result.reason))
        continue
      code, reason = _run_one(plan, run, workdir, train, progress, result.step)
      if code in (TERMINATED, 128 + signal.SIGINT):
        deadline.signalled = True
        stopped = code
        break
      if reason == "busy":
        busy.append(run)
      elif reason:
        failed.append((run, reason))
        console.print(f"{run.run_id}: failed: {reason}", err=True)
  for line in _summary(progress, failed, busy):
    console.print(line)
  if deadline.signalled:
    console.print("the time is up" if deadline.is_over() else "stopped", err=not deadline.is_over())
    console.print("the same command continues from there")
    if not deadline.is_over():
      return stopped
  return 1 if failed else 0


def _run_one(
  plan: SweepPlan, run: PlannedRun, workdir: str, train: Callable[..., int], progress: SweepProgress, step: int
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
  except (UserError, Exception) as error:  # whatever one run does, the others go on
    return 1, str(error) if isinstance(error, UserError) else format_exception(error)
  if code:
    return code, "" if code >= 128 else f"exit code {code}"
  result = read_result(plan, run, workdir)
  if result.status != "finished":
    return 1, f"it ended as {result.status}"
  progress.add_finished(run, 1 - step / run.steps)
  text = f"{result.values['val_bpb']:.4f} bits per byte, {format_duration(time.monotonic() - start)}"
  progress.console.print(f"run {progress.finished}/{progress.count}  {progress.line(run, 0.0, 0.0, text)}")
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
  yield f"{progress.finished} of {progress.count} runs have finished"
  if failed:
    yield f"{len(failed)} failed:"
    yield from (f"  {run.run_id}: {reason}" for run, reason in failed)
  if busy:
    yield f"{len(busy)} are in progress in other processes: {', '.join(run.run_id for run in busy)}"


class Deadline:
  """Sends SIGTERM to this process when its minutes are over, while the block lasts: a run saves and ends then.

  Between runs the signal is noted in `signalled`, whoever sent it.
  """

  def __init__(self, minutes: float):
    self.end = time.monotonic() + 60 * minutes if minutes else float("inf")
    self.timer = threading.Timer(60 * minutes, lambda: os.kill(os.getpid(), signal.SIGTERM)) if minutes else None
    self.signalled = False

  def is_over(self) -> bool:
    """Whether the time is up."""
    return time.monotonic() >= self.end

  def __enter__(self) -> "Deadline":
    def note(number: int, frame: Any) -> None:
      self.signalled = True

    self.handles = threading.current_thread() is threading.main_thread()  # Python allows handlers there alone
    self.previous = signal.signal(signal.SIGTERM, note) if self.handles else None
    if self.timer:
      self.timer.daemon = True
      self.timer.start()
    return self

  def __exit__(self, *exception: Any) -> None:
    if self.timer:
      self.timer.cancel()
    if self.handles:
      signal.signal(signal.SIGTERM, self.previous)


def run_workers(workers: int, argv: Sequence[str]) -> int:
  """Runs the command `argv` in several processes at once, which share the sweep's runs by their locks.

  Each gets its share of the cores. Returns the largest of their exit codes.
  """
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  environment = {**os.environ, "NPROC": str(max(1, cores // workers))}
  command = [sys.executable, "-m", "deepseek_jax.scaling", *argv]
  processes = [subprocess.Popen([*command, f"--worker={i}/{workers}"], env=environment) for i in range(workers)]
  try:
    return max(process.wait() % 256 for process in processes)
  except KeyboardInterrupt:  # the terminal has sent it to the workers too
    return max(process.wait() % 256 for process in processes)
