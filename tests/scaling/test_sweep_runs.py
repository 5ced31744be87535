"""Sweeps that are really run, tiny ones, through the command line's functions."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from deepseek_jax.checkpoint.lock import lock_workdir
from deepseek_jax.console import Console, set_console
from deepseek_jax.errors import ConfigError
from deepseek_jax.scaling import allocation, commands, sweep_plan
from deepseek_jax.scaling.laws import DEEPSEEK_ALLOCATION, PowerLaw
from deepseek_jax.scaling.sweep_plan import load_plan
from deepseek_jax.scaling.sweep_results import read_result
from deepseek_jax.scaling.sweep_runs import order_for_worker, parse_shard, run_sweep, run_workers, select_runs
from deepseek_jax.scaling.table import read_table

TEXT = "def f(x):\n  return x + 1\n\n\n"
FLAGS = [
  "--config=small_dense",
  "--seq=64",
  "--span=1.3",
  "--batch_multiple=4",
  "--batch_scale=2",
  "--config.eval.final_sequences=20",
]


class Lines(Console):
  """Keeps what it is told."""

  def __init__(self):
    super().__init__(bars=False)
    self.lines = []

  def print(self, text, err=False):
    self.lines += text.splitlines()


def make_plan(folder, *flags):
  """Writes text and a plan of tiny runs, and returns the plan's path."""
  text = folder / "text"
  text.mkdir(exist_ok=True)
  for i in range(40):
    (text / f"{i}.txt").write_text(f"{i}\n" + TEXT * 40)
  plan = folder / "plan.json"
  data = [f"--config.data.sources={text}", f"--config.data.cache={folder / 'cache'}"]
  assert commands.plan(["plan", *FLAGS, *data, *flags, f"--out={plan}"]) == 0
  return plan


@pytest.fixture
def console():
  with set_console(Lines()) as lines:
    yield lines


@pytest.fixture
def short_runs(monkeypatch):
  """Plans take the smallest model for a tenth of the FLOPs, and few steps for enough."""
  law = dataclasses.replace(DEEPSEEK_ALLOCATION, scale_law=PowerLaw(3e4 / 1e9**0.5, 0.5))
  monkeypatch.setattr(allocation, "DEEPSEEK", allocation.AllocationEstimate(law))
  monkeypatch.setattr(sweep_plan, "MIN_STEPS", 30)


def run(plan, workdir, *flags):
  return commands.run(["run", f"--plan={plan}", f"--workdir={workdir}", *flags])


def test_a_sweep_runs_in_shards_and_its_table_has_every_run(tmp_path, console, short_runs):
  plan = make_plan(tmp_path, "--budgets=1.05e9,1.2e9", "--per_budget=1", "--seeds=2")
  runs = load_plan(plan).runs
  assert len(runs) == 4
  assert run(plan, tmp_path / "w", "--shard=1/2") == 0
  assert sum("run " in line and "bits per byte" in line for line in console.lines) == 2
  assert run(plan, tmp_path / "w", "--shard=2/2") == 0
  start, console.lines[:] = time.monotonic(), []
  assert run(plan, tmp_path / "w") == 0
  assert time.monotonic() - start < len(runs)  # finished runs take less than a second each
  assert console.lines == ["4 of 4 runs have finished"]
  out = tmp_path / "runs.csv"
  assert commands.table(["table", f"--workdir={tmp_path / 'w'}", f"--out={out}"]) == 0
  table = read_table(out)
  assert sorted(table["run_id"]) == sorted(r.run_id for r in runs)
  by_id = {r.run_id: r for r in runs}
  for i, name in enumerate(table["run_id"]):
    assert table.flops()[i] == by_id[name].flops and table.tokens()[i] == by_id[name].tokens
  assert (table["val_loss"] / np.log(2) / table["val_bpb"] == pytest.approx(1, rel=0.1)) and (
    table["seconds"] > 0
  ).all()
  assert len(set(table["unique_tokens"])) == 1
  numbers = json.loads((tmp_path / "w" / "runs" / runs[0].run_id / "config.json").read_text())
  assert numbers["train"]["steps"] == runs[0].steps


def test_a_failed_run_does_not_stop_the_sweep_and_is_shown(tmp_path, console):
  plan_path = make_plan(tmp_path, "--budgets=1.05e10", "--per_budget=1", "--seeds=2")
  plan = load_plan(plan_path)
  trained = []

  def train(config, workdir, **arguments):
    trained.append(config.name)
    raise ValueError("this run is odd")

  workdir = str(tmp_path / "w")
  assert run_sweep(plan, workdir, plan.runs, train, console=console) == 1
  assert trained == [r.run_id for r in plan.runs]
  assert "0 of 2 runs have finished" in console.lines and "2 failed:" in console.lines
  assert f"  {trained[0]}: ValueError: this run is odd" in console.lines


def test_a_run_that_another_process_trains_is_left_to_it(tmp_path, console):
  plan = load_plan(make_plan(tmp_path, "--budgets=1.05e10", "--per_budget=1"))
  checkpoints = tmp_path / "w" / "runs" / plan.runs[0].run_id / "checkpoints"
  checkpoints.mkdir(parents=True)

  def train(*arguments, **options):
    raise AssertionError("it is in progress elsewhere")

  with lock_workdir(checkpoints):
    assert run_sweep(plan, str(tmp_path / "w"), plan.runs, train, console=console) == 0
  assert any("are in progress in other processes" in line for line in console.lines)


def test_another_plan_in_the_same_workdir_is_refused(tmp_path, console):
  plan = make_plan(tmp_path, "--budgets=1.05e10", "--per_budget=1")
  assert run(plan, tmp_path / "w", "--dry_run") == 0
  assert any("not started" in line for line in console.lines)
  other = make_plan(tmp_path, "--budgets=1.05e10", "--per_budget=1", "--lr_scale=2")
  with pytest.raises(ConfigError, match="use another --workdir"):
    run(other, tmp_path / "w")
  more = make_plan(tmp_path, "--budgets=1.05e10,1.2e10", "--per_budget=1")
  assert run(more, tmp_path / "w", "--dry_run") == 0
  folder = tmp_path / "w" / "runs" / load_plan(more).runs[0].run_id
  folder.mkdir(parents=True)
  (folder / "events.jsonl").write_text('{"event": "start", "step": 0}\n')
  (folder / "config.json").write_text("{}")
  with pytest.raises(ConfigError, match="a run of another config"):
    run(more, tmp_path / "w", "--dry_run")


def test_shards_and_workers_part_the_runs(tmp_path, console):
  plan = load_plan(make_plan(tmp_path, "--budgets=1.05e10,1.2e10", "--per_budget=3"))
  parts = [select_runs(plan, (), parse_shard(f"{i}/3")) for i in (1, 2, 3)]
  assert sorted(r.run_id for part in parts for r in part) == sorted(r.run_id for r in plan.runs)
  assert parts[2] == select_runs(plan, (), parse_shard("0/3"))  # counted from 0 it is the same part
  assert {r.budget for r in select_runs(plan, (1.2e10,), (0, 1))} == {1.2e10}
  assert order_for_worker(plan.runs, (1, 2), "gs://bucket/w") == list(plan.runs[1::2])
  assert set(r.run_id for r in order_for_worker(plan.runs, (1, 2), "w")) == {r.run_id for r in plan.runs}
  for text in ("3", "4/3", "a/b", "1/0"):
    with pytest.raises(ConfigError, match="expected i/n"):
      parse_shard(text)
  with pytest.raises(ConfigError, match="not in the plan"):
    select_runs(plan, (5e9,), (0, 1))


def test_when_the_minutes_are_over_the_run_is_saved_and_goes_on(tmp_path, console, short_runs):
  plan_path = make_plan(tmp_path, "--budgets=1.05e9", "--per_budget=1")
  plan = load_plan(plan_path)
  assert run(plan_path, tmp_path / "w", "--max_minutes=0.0001") == 0
  assert "the time is up" in console.lines and read_result(plan, plan.runs[0], str(tmp_path / "w")).status != "finished"
  assert run(plan_path, tmp_path / "w") == 0
  assert read_result(plan, plan.runs[0], str(tmp_path / "w")).status == "finished"


def start(plan, workdir, *flags):
  command = [sys.executable, "-m", "deepseek_jax.scaling", "run", f"--plan={plan}", f"--workdir={workdir}", *flags]
  environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def results(plan, workdir):
  rows = [(r.run_id, read_result(plan, r, str(workdir))) for r in plan.runs]
  assert {result.status for _, result in rows} == {"finished"}
  return {name: (result.values["val_loss"], result.values["val_bpb"]) for name, result in rows}


@pytest.mark.scaling
def test_a_sweep_that_is_killed_five_times_has_the_same_table(tmp_path, console):
  plan_path = make_plan(tmp_path, "--budgets=1.05e10,1.2e10,3.75e10", "--per_budget=1", "--seeds=2")
  plan = load_plan(plan_path)
  assert start(plan_path, tmp_path / "whole").wait() == 0
  generator, killed = np.random.default_rng(0), 0
  for _ in range(5):
    process = start(plan_path, tmp_path / "killed")
    try:
      process.wait(generator.uniform(5, 14))
    except subprocess.TimeoutExpired:
      process.send_signal(signal.SIGKILL)
    killed += process.wait() == -signal.SIGKILL
  assert start(plan_path, tmp_path / "killed").wait() == 0
  logs = (tmp_path / "killed" / "runs").glob("*/events.jsonl")
  resumed = [log for log in logs if '"resume"' in log.read_text()]
  assert killed == 5 and resumed  # runs went on in the middle
  assert results(plan, tmp_path / "killed") == results(plan, tmp_path / "whole")


@pytest.mark.scaling
def test_processes_that_start_at_once_share_the_runs(tmp_path, console):
  plan_path = make_plan(tmp_path, "--budgets=1.05e10,1.2e10", "--per_budget=1", "--seeds=3")
  plan, workdir = load_plan(plan_path), tmp_path / "w"
  processes = [
    start(plan_path, workdir, "--workers=2"),
    start(plan_path, workdir),
    start(plan_path, workdir, "--shard=1/2"),
  ]
  outputs = [process.communicate()[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0, 0], outputs
  assert start(plan_path, workdir).wait() == 0
  results(plan, workdir)
  for r in plan.runs:
    events = (workdir / "runs" / r.run_id / "events.jsonl").read_text()
    assert events.count('"event": "start"') == 1 and events.count('"event": "end"') == 1


def test_workers_are_told_to_stop_and_are_waited_for(tmp_path, monkeypatch):
  worker = tmp_path / "worker"
  worker.write_text(f"""#!{sys.executable}
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
name = sys.argv[-1].removeprefix("--worker=").replace("/", "_")
pathlib.Path({str(tmp_path)!r}, name).write_text(os.environ["NPROC"])
while name == "1_2" and not pathlib.Path({str(tmp_path)!r}, "0_2").exists():
  time.sleep(0.01)
if name == "1_2":
  os.kill(os.getppid(), signal.SIGTERM)
signal.pause()
""")
  worker.chmod(0o700)
  monkeypatch.setattr(sys, "executable", str(worker))
  assert run_workers(2, ["run"]) == 143
  cores = len(os.sched_getaffinity(0))
  assert [(tmp_path / name).read_text() for name in ("0_2", "1_2")] == [str(max(1, cores // 2))] * 2
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
