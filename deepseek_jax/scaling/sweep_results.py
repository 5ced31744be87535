"""What the runs of a sweep have given, read from their folders, which may be in a bucket."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import load_config
from deepseek_jax.scaling.sweep_plan import PLAN_FILE, PlannedRun, SweepPlan
from deepseek_jax.storage import local_copy
from deepseek_jax.training import metrics


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
  with local_copy(run_folder(workdir, run), (metrics.METRICS, metrics.EVENTS, "config.json")) as copy:
    folder = pathlib.Path(copy)
    events = metrics.read_jsonl(folder / metrics.EVENTS)
    if not events:
      return RunResult("not started", {})
    if not (folder / "config.json").exists():  # stopped before its first step
      return RunResult("stopped", {})
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


def status_lines(plan: SweepPlan, runs: Sequence[PlannedRun], workdir: str) -> Iterator[str]:
  """A line for each run: its FLOPs, and how far it is."""
  for run in runs:
    result = read_result(plan, run, workdir)
    detail = result.reason or f"step {result.step:,} of {run.steps:,}"
    yield f"{run.run_id:32}  {run.flops:.3g} FLOPs  {result.status:12} {detail}"
