"""Whole runs through the command line: kill, signal, resume, and what a run leaves behind.

Processes that are killed are real ones. The others run here, where a program is traced and compiled once.
"""

import contextlib
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from deepseek_jax import train
from deepseek_jax.checkpoint.__main__ import main as checkpoint_main
from deepseek_jax.checkpoint.hf_files import HFReader
from deepseek_jax.checkpoint.manager import CheckpointReader
from deepseek_jax.console import Console, SilentConsole
from deepseek_jax.flags import load_config, run_program
from deepseek_jax.generate.__main__ import main as generate_main
from deepseek_jax.training import clock, layer_aux
from deepseek_jax.training.expert_loads import read_expert_loads
from deepseek_jax.training.goodput import read_goodput
from deepseek_jax.training.layer_aux import LayerAux, Observation
from deepseek_jax.training.run_log import RunLog
from deepseek_jax.training.skipped import Diverged
from tests.configs import RUN
from tests.parity.cases import V3, Case
from tests.parity.weights import write_folder
from tests.steps import compilations

STEPS = 12
# The config.json of the model of RUN.
HUGGING_FACE = V3 | {
  "vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 3, "num_nextn_predict_layers": 1, "intermediate_size": 48,
  "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
  "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
  "routed_scaling_factor": 1.0, "rope_scaling": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with text, a config and a data cache."""
  folder = tmp_path_factory.mktemp("runs")
  (folder / "text").mkdir()
  rng = random.Random(0)
  for i in range(30):
    words = " ".join(rng.choice(["def", "return", "x", "y", "+", "=", "(", ")"]) for _ in range(300))
    (folder / "text" / f"{i}.txt").write_text(words)
  config = RUN.format(source=str(folder / "text"), cache=str(folder / "cache"), steps=STEPS)
  (folder / "config.py").write_text(config)
  return folder


def environment():
  env = dict(os.environ)
  env["XLA_FLAGS"] = " ".join(f for f in env["XLA_FLAGS"].split() if "device_count" not in f)
  env.pop("NPROC", None)
  return env


def flags_of(folder, workdir):
  return f"--config={folder}/config.py", f"--workdir={folder / workdir}"


def start(folder, workdir, *arguments):
  """A training process in `folder`/`workdir`, with as many devices as this one has."""
  command = [sys.executable, "-m", "deepseek_jax.train", *flags_of(folder, workdir), *arguments]
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def call(main, *arguments, code=0):
  """What a program prints that ends with `code`, run in this process."""
  out = io.StringIO()
  with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
    patch.setattr(sys, "argv", ["program", *arguments])
    patch.setattr(clock, "process_start", time.monotonic)  # this process began long before the run
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
      run_program(main)
  assert end.value.code == code, out.getvalue()
  return out.getvalue()


def run(folder, workdir, *arguments, code=0):
  """What a training run in `folder`/`workdir` prints."""
  return call(train.main, *flags_of(folder, workdir), *arguments, code=code)


def finish(process, code=0):
  out, _ = process.communicate(timeout=200)
  assert process.returncode == code, out
  return out


def program(name, *arguments):
  """What `python -m deepseek_jax.<name>` prints, which ends well."""
  command = [sys.executable, "-m", f"deepseek_jax.{name}", *arguments]
  done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=100)
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def lines(folder, workdir, name="metrics.jsonl"):
  return [json.loads(line) for line in (folder / workdir / name).read_text().splitlines()]


def wait_for(condition, process):
  while process.poll() is None and not condition():
    time.sleep(0.002)


def wait_for_step(folder, workdir, step, process):
  path = folder / workdir / "metrics.jsonl"
  wait_for(lambda: path.exists() and path.read_text().count("\n") >= step, process)


@pytest.fixture(scope="module")
def uninterrupted(folder):
  """(printed text, state_sha256, losses) of a run that nothing disturbed."""
  out = run(folder, "reference")
  end = lines(folder, "reference", "events.jsonl")[-1]
  assert end["event"] == "end" and end["reason"] == "finished" and f"state_sha256 {end['state_sha256']}" in out
  return out, end["state_sha256"], [line["loss"] for line in lines(folder, "reference")]


@pytest.fixture(scope="module")
def six_steps(folder):
  """The workdir of a run that was asked for six steps only."""
  run(folder, "six", "--config.train.steps=6")
  return "six"


def copied(folder, workdir, name):
  """A copy of a run's folder, which costs less than the run."""
  shutil.copytree(folder / workdir, folder / name)
  return name


def test_a_run_shows_and_leaves_what_it_should(folder, uninterrupted):
  out, _, losses = uninterrupted
  workdir = folder / "reference"
  for words in (
    "parameters ", "FLOPs per token", "tokens planned", "memory estimate", "devices  4 x cpu", str(workdir), "from scratch",
    "model.embed=32", "learning rate    ", "goodput ", f"step {STEPS}/{STEPS}", "held-out loss", "sample\ndef ", "report.html", "--config.train.steps=24",
    "--config=small",
  ):  # fmt: skip
    assert words in out, words
  banner = out[out.index("run      ") : out.index("compiled in")].splitlines()
  assert len(banner) <= 15
  assert "model.norm_eps" not in out  # a default: config.json has it, and --print_config prints it
  metrics = lines(folder, "reference")
  assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
  assert losses[-1] < losses[0]
  for key in (
    "total_loss",
    "bits_per_byte",
    "grad_norm",
    "learning_rate",
    "mtp_weight",
    "mtp_loss_1",
    "bias_update_rate",
    "balance_loss",
    "max_vio",
    "router/layer_1/max_vio",
    "router/mtp_1/dead_experts",
    "rms/layer_0/activations",
    "rms/mtp_1/gradients",
    "tokens_per_second",
    "skipped",
    "data_seconds",
  ):
    assert all(key in line for line in metrics), key
  assert [line["samples"] for line in metrics][:4] == [4, 8, 12, 16] and metrics[-1]["samples"] > 4 * STEPS  # the ramp
  assert {e["event"] for e in lines(folder, "reference", "events.jsonl")} == {"start", "eval", "sample", "end"}
  saved = json.loads((workdir / "config.json").read_text())
  assert saved["train"]["steps"] == STEPS and saved["model"]["norm_eps"] == 1e-6
  assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
  page = (workdir / "report.html").read_text()
  assert "<svg" in page and "Nothing to note." in page and "data:image/png" in page
  loads = read_expert_loads(workdir)
  assert loads.steps.tolist() == list(range(1, STEPS + 1))
  assert {layer: codes.shape[1] for layer, codes in loads.codes.items()} == {"layer_1": 4, "layer_2": 4, "mtp_1": 4}
  assert sorted(p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()) == ["12", "6", "9"]


def test_the_same_command_again_says_that_it_finished(folder, uninterrupted):
  before = (folder / "reference" / "metrics.jsonl").read_bytes()
  assert "finished already, at step 12. To train on:" in run(folder, "reference")
  out = run(folder, "reference", "--config.train.steps=5")
  assert "finished already, at step 12, and train.steps=5 asks for no more. To train on:" in out
  assert "--config.train.steps=24 --config.schedule.steps=24" in out
  assert (folder / "reference" / "metrics.jsonl").read_bytes() == before


def test_the_commands_that_a_run_prints_work_as_printed(folder, uninterrupted):
  """Those of a finished schedule, on a copy of the run's folder."""
  workdir = copied(folder, "reference", "printed")
  printed = uninterrupted[0].partition("\nnext\n")[2].replace(str(folder / "reference"), str(folder / workdir))
  commands = dict(zip(*[iter(line.strip() for line in printed.splitlines()[:6])] * 2, strict=True))
  programs = {"deepseek_jax.train": train.main, "deepseek_jax.generate": generate_main}
  outputs = {}
  for name, extra in (("sample", []), ("train on", []), ("train a bigger model", ["--dry_run"])):
    python, module, program, *arguments = shlex.split(commands[name])
    assert os.path.samefile(python, sys.executable) and module == "-m"
    outputs[name] = call(programs[program], *arguments, *extra)
  assert "def " in outputs["sample"]
  assert "the schedule has changed: step 13 has a learning rate of" in outputs["train on"]
  rates = [line["learning_rate"] for line in lines(folder, workdir)]
  assert len(rates) == 24 and rates[12] > rates[11] > rates[23]  # up again, and down to the end
  assert "model.embed = " in outputs["train a bigger model"]


def test_a_run_that_its_schedule_does_not_fit_is_warned(folder):
  arguments = "--config.train.steps=30", "--dry_run"
  out = run(folder, "unfit", *arguments)
  assert "warning          schedule.steps=12 ends before the run, at 30 steps" in out
  assert "warning" not in run(folder, "unfit", "--dry_run")
  out = run(folder, "unfit", "--config.schedule.warmup_steps=12", "--dry_run", code=2)
  assert (
    out.startswith("error: schedule.warmup_steps=12 is not shorter than schedule.steps=12") and out.count("\n") == 1
  )
  assert run(folder, "unfit", "--config.schedule.warmup_steps=12", code=2).startswith("error: schedule.warmup_steps=12")
  assert not (folder / "unfit").exists()


def test_one_text_file_trains(folder):
  path = folder / "input.txt"
  path.write_text("\n".join((folder / "text" / f"{i}.txt").read_text() for i in range(4)))
  out = run(folder, "single", f"--config.data.sources={path}", "--config.train.steps=2", "--config.eval.every=100")
  assert "data: " in out and "1 document, too few to hold some out, cut at line or sentence ends into" in out
  assert "warning  train.steps=2 ends within the warm-up" in out
  assert lines(folder, "single", "events.jsonl")[-1]["reason"] == "finished"


def test_a_run_that_hangs_ends_with_its_stacks_and_the_same_command_resumes_bitwise(folder, uninterrupted):
  fault = """
import time
from deepseek_jax.training import trainer
loads, load_batch = [], trainer.load_batch
def load(*arguments, **options):
  loads.append(0)
  if len(loads) == 9:
    time.sleep(1000)
  return load_batch(*arguments, **options)
trainer.load_batch = load
"""
  (folder / "hanging.py").write_text(fault + (folder / "config.py").read_text())
  process = start(folder, "hung", f"--config={folder}/hanging.py", "--config.watchdog.step_seconds=3")
  out = finish(process, 42)
  assert re.search(
    r"error: hang: no progress for .+ s, limit .+ s, after step 8: waiting for the next batch; the stacks", out
  )
  (stacks,) = (folder / "hung" / "hangs").iterdir()
  assert "time.sleep(1000)" in stacks.read_text() and "next(data_iterator)" in stacks.read_text()
  end = lines(folder, "hung", "events.jsonl")[-1]
  assert (end["event"], end["reason"], end["step"]) == ("end", "hung", 8) and end["error"].startswith(
    "hang: no progress"
  )
  assert "hung" in (folder / "hung" / "report.html").read_text()
  out = run(folder, "hung", "--config.watchdog.step_seconds=3")
  assert "resume   from the checkpoint of step 6" in out and "goodput " in out
  assert lines(folder, "hung", "events.jsonl")[-1]["state_sha256"] == uninterrupted[1]
  assert read_goodput(folder / "hung").seconds["down"] > 3  # the hang is part of it


@pytest.mark.parametrize(("kills", "steps"), [(2, STEPS), pytest.param(20, 80, marks=pytest.mark.chaos)])
def test_kill_9_resumes_bitwise(folder, uninterrupted, kills, steps):
  """Kills at random moments; then the same parameters, batches and losses as if nothing had happened."""
  reference, workdir, length = "reference", f"killed-{kills}", f"--config.train.steps={steps}"
  if steps != STEPS:
    reference = "long-reference"
    run(folder, reference, length)
  seed, first = random.randrange(10**6), time.time()
  rng = random.Random(seed)
  print("seed of the kills:", seed)
  killed = 0
  for i in range(kills):
    process, path = start(folder, workdir, length), folder / workdir / "metrics.jsonl"
    done = path.read_text().count("\n") if path.exists() else 0
    wait_for_step(folder, workdir, done + rng.randrange(1, 4), process)
    if i == 0:  # so that at least one restart restores
      wait_for(lambda: any(p.name.isdigit() for p in (folder / workdir / "checkpoints").iterdir()), process)
    time.sleep(rng.random() * 0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed += process.returncode == -signal.SIGKILL
  run(folder, workdir, length)
  events = lines(folder, workdir, "events.jsonl")
  goodput, last = read_goodput(folder / workdir), (folder / workdir / "goodput.jsonl").stat().st_mtime
  assert goodput.total == pytest.approx(last - first, rel=0.01) and goodput.starts > 1
  assert goodput.seconds["down"] > 0
  assert killed >= kills // 2 and "resume" in {e["event"] for e in events}
  assert events[-1]["state_sha256"] == lines(folder, reference, "events.jsonl")[-1]["state_sha256"]
  for key in ("step", "loss", "grad_norm", "samples"):
    assert [line[key] for line in lines(folder, workdir)] == [line[key] for line in lines(folder, reference)]
  loads = [(folder / name / "expert_loads.bin").read_bytes() for name in (workdir, reference)]
  assert loads[0] == loads[1]


def run_until(folder, workdir, step, *arguments):
  """What a run prints that gets SIGINT, as of Ctrl-C, when it logs `step`."""
  log_step = RunLog.step

  def log_and_stop(self, logged, *arguments):
    log_step(self, logged, *arguments)
    if logged == step:
      signal.raise_signal(signal.SIGINT)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(RunLog, "step", log_and_stop)
    return run(folder, workdir, *arguments, code=130)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_saves_and_the_same_command_goes_on(folder, uninterrupted, number):
  workdir = number.name
  if number == signal.SIGINT:
    out = run_until(folder, workdir, 2)
  else:
    process = start(folder, workdir)
    wait_for_step(folder, workdir, 2, process)
    process.send_signal(number)
    out = finish(process, 143)
  stopped = lines(folder, workdir, "events.jsonl")[-1]
  assert stopped["reason"] == number.name and f"stopped by {number.name} at step {stopped['step']}" in out
  assert 2 <= stopped["step"] < STEPS
  out = run(folder, workdir)
  assert f"resume   from the checkpoint of step {stopped['step']}" in out
  assert lines(folder, workdir, "events.jsonl")[-1]["state_sha256"] == uninterrupted[1]


def test_corrupt_checkpoint_falls_back_and_ends_the_same(folder, uninterrupted):
  copied(folder, "reference", "corrupt")
  newest = folder / "corrupt" / "checkpoints" / "12"
  data = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  content = bytearray(data.read_bytes())
  content[len(content) // 2] ^= 1
  data.write_bytes(content)
  out = run(folder, "corrupt")
  assert "12 rejected" in out and "resume   from the checkpoint of step 9" in out
  assert lines(folder, "corrupt", "events.jsonl")[-1]["state_sha256"] == uninterrupted[1]
  assert [line["step"] for line in lines(folder, "corrupt")] == list(range(1, STEPS + 1))


def test_a_stop_in_the_last_step_still_gets_its_evaluation_and_sample(folder, uninterrupted):
  copied(folder, "reference", "last")
  path = folder / "last" / "events.jsonl"
  events = [e for e in lines(folder, "last", "events.jsonl") if e["event"] in ("start", "end")]
  path.write_text("".join(json.dumps(e | {"reason": "SIGTERM"}) + "\n" for e in events))
  assert "held-out loss" in run(folder, "last")
  events = lines(folder, "last", "events.jsonl")
  assert [e["event"] for e in events[-3:]] == ["eval", "sample", "end"] and events[-1]["reason"] == "finished"


def test_no_good_checkpoint_is_an_error_and_not_a_fresh_start(folder, six_steps):
  copied(folder, six_steps, "rotten")
  for step in ("3", "6"):
    (folder / "rotten" / "checkpoints" / step / "manifest.json").write_text("{}")
  before = (folder / "rotten" / "metrics.jsonl").read_bytes()
  out = run(folder, "rotten", code=2)
  assert out.count("malformed") == 2 and "--workdir" in out and "Traceback" not in out
  assert (folder / "rotten" / "metrics.jsonl").read_bytes() == before


def test_raising_the_steps_continues_a_finished_run(folder, uninterrupted, six_steps):
  copied(folder, six_steps, "longer")
  out = run(folder, "longer")
  assert "changed  train.steps: 6 -> 12" in out and "resume   from the checkpoint of step 6" in out
  assert lines(folder, "longer", "events.jsonl")[-1]["state_sha256"] == uninterrupted[1]


def test_the_length_of_sequences_may_change_and_tokens_go_on(folder, six_steps):
  """768 tokens in 6 steps, then sequences of half the length, and back; products with samples would be other counts."""
  workdir = copied(folder, six_steps, "lengths")
  by_tokens = ("--config.schedule.warmup_tokens=1000", "--config.schedule.tokens=4000", "--config.eval.every=100")
  frozen = "--config.balance.bias_update_tokens=900"
  out = run_until(folder, workdir, 9, "--config.data.seq=16", *by_tokens, frozen)
  assert "changed  data.seq: 32 -> 16" in out and "step 6 (24 sequences, 768 tokens seen)" in out
  assert "tokens planned   1,472 in 12 steps; to go: 704 in 6 steps (" in out  # 4 sequences, and 5 times 8
  out = run_until(folder, workdir, 10, *by_tokens, frozen)
  assert "changed  data.seq: 16 -> 32" in out and "step 9 (44 sequences, 1,088 tokens seen)" in out
  assert "tokens planned   1,856 in 12 steps; to go: 768 in 3 steps (" in out
  samples, tokens = [24, 28, 36, 44, 52], [768, 832, 960, 1088, 1344]  # the ramp ends at 800 tokens
  logged = lines(folder, workdir)[5:]
  assert ([line["samples"] for line in logged], [line["tokens"] for line in logged]) == (samples, tokens)
  metas = [CheckpointReader(folder / workdir).meta(step) for step in (6, 9, 10)]
  assert [(meta["samples"], meta["tokens"]) for meta in metas] == [(24, 768), (44, 1088), (52, 1344)]
  resumed = logged[1:]
  assert [line["mtp_weight"] for line in resumed] == [0.3, 0.3, 0.3, 0.1]  # 0.1 from 1000 tokens on
  assert [line["bias_update_rate"] for line in resumed] == [0.01, 0.01, 0, 0]
  assert [line["learning_rate"] for line in resumed[:2]] == pytest.approx([3e-3 * 0.832, 3e-3 * 0.96])


def test_muon_resumes_bitwise(folder):
  """Its state is other than AdamW's: of hidden matrices one momentum, of the others two moments."""
  options = [f"--config.{field}" for field in (
    "optimizer.kind=muon", "optimizer.moments_dtype=bfloat16", "model.layers=1", "model.num_mtp_layers=0", "train.steps=4",
    "eval.every=100", "eval.final_sequences=1",
  )]  # fmt: skip
  run(folder, "muon", *options)
  assert "stopped by SIGINT at step 2" in run_until(folder, "muon-stopped", 2, *options)
  assert "resume   from the checkpoint of step 2" in run(folder, "muon-stopped", *options)
  ends = [lines(folder, workdir, "events.jsonl")[-1] for workdir in ("muon", "muon-stopped")]
  assert ends[0]["reason"] == "finished" and ends[0]["state_sha256"] == ends[1]["state_sha256"]
  out = run(folder, "muon", "--config.optimizer.kind=adamw", *options[1:], "--config.train.steps=5", code=2)
  assert "optimizer.kind: checkpoint muon, config adamw" in out and "Traceback" not in out


def test_a_program_silences_a_run_and_gets_all_that_it_writes(folder, uninterrupted, capsys):
  written = []

  class Recorder:
    def __init__(self, run_folder, resume_step):
      written.append(("opened", os.path.basename(run_folder), resume_step))

    def write(self, step, values, histograms):
      assert sum(histograms["router/layer_1/load"]) == pytest.approx(1)
      written.append(("line", {"step": step, **values}))

    def event(self, name, step, **values):
      written.append(("event", {"event": name, "step": step, **values}))

    def close(self):
      written.append(("closed",))

  config = load_config(f"{folder}/config.py", {"train.steps": 3, "log.tensorboard": False})
  assert train.train(config, str(folder / "silent"), console=SilentConsole(), writers=[Recorder]) == 0
  out = capsys.readouterr()
  assert (out.out, out.err) == ("", "")
  assert (written[0], written[-1]) == (("opened", "silent", 0), ("closed",))
  assert [line for kind, *line in written[1:-1] if kind == "line"] == [[line] for line in lines(folder, "silent")]
  events = lines(folder, "silent", "events.jsonl")
  assert [e["event"] for e in events] == ["start", "eval", "sample", "end"] and all(e.pop("time") for e in events)
  assert [event for kind, *event in written[1:-1] if kind == "event"] == [[event] for event in events]
  assert not (folder / "silent" / "tensorboard").exists()
  with compilations() as compiled:
    assert train.train(config, str(folder / "again"), console=SilentConsole()) == 0
  assert compiled == [], "a second run in this process compiles nothing"
  assert lines(folder, "again", "events.jsonl")[-1]["state_sha256"] == events[-1]["state_sha256"]


class QuietWriter:
  """A writer of metrics that does nothing."""

  def __init__(self, run_folder, resume_step):
    pass

  def write(self, step, values, histograms):
    pass

  def event(self, name, step, **values):
    pass

  def close(self):
    pass


def test_intervals_add_up_to_the_wall_time_and_steps_do_not_wait_for_a_slow_writer(folder, uninterrupted, monkeypatch):
  times, log_step = [], RunLog.step

  class SlowWriter(QuietWriter):
    def write(self, step, values, histograms):
      time.sleep(1)

  def timed_step(self, *arguments):
    times.append(time.monotonic())
    log_step(self, *arguments)

  monkeypatch.setattr(RunLog, "step", timed_step)
  fields = {"train.steps": 6, "eval.every": 100, "checkpoint.every": 100, "log.tensorboard": False}
  config = load_config(f"{folder}/config.py", fields)
  assert train.train(config, str(folder / "slow"), console=SilentConsole(), writers=[SlowWriter]) == 0
  lines_of_steps = lines(folder, "slow")
  wall = times[-1] - times[0]
  names = ("step_seconds", "data_seconds", "eval_seconds", "checkpoint_seconds")
  assert sum(line[name] for line in lines_of_steps[1:] for name in names) == pytest.approx(wall, abs=0.1)
  assert wall < 4 and len(lines_of_steps) == 6
  rates = [line["tokens_per_second"] for line in lines_of_steps]
  tokens = [end["tokens"] - start["tokens"] for start, end in zip(lines_of_steps, lines_of_steps[1:], strict=False)]
  assert sum(t / rate for t, rate in zip(tokens, rates[1:], strict=True)) == pytest.approx(wall, abs=0.1)


def test_another_model_is_refused_with_the_fields(folder, uninterrupted):
  out = run(folder, "reference", "--config.model.mlp=96", "--config.train.steps=20", code=2)
  assert "model.mlp: checkpoint 48, config 96" in out and "--workdir" in out and "Traceback" not in out


def test_frozen_parameters_stay_over_a_resume(folder, uninterrupted):
  sizes = ("--config.model.layers=1", "--config.model.num_mtp_layers=0", "--config.eval.every=100")
  options = *sizes, "--config.optimizer.trainable=*/attn/*,head/*"
  for workdir, steps in (("frozen", 3), ("frozen", 6), ("frozen-at-once", 6)):
    run(folder, workdir, *options, f"--config.train.steps={steps}")
  ends = [lines(folder, workdir, "events.jsonl")[-1] for workdir in ("frozen", "frozen-at-once")]
  assert ends[0]["state_sha256"] == ends[1]["state_sha256"]
  out = run(folder, "frozen", *sizes, "--config.train.steps=7", code=2)
  assert "optimizer.trainable: checkpoint ['*/attn/*', 'head/*'], config []" in out


def test_other_data_is_refused_unless_accepted(folder, six_steps):
  workdir = copied(folder, six_steps, "other")
  extra = folder / "text" / "extra.txt"
  extra.write_text("def new ( x ) = y " * 100)
  try:
    out = run(folder, workdir, "--config.train.steps=7", code=2)
    assert "fingerprint" in out and "--accept_data_change" in out and "Traceback" not in out
    run(folder, workdir, "--config.train.steps=7", "--accept_data_change")
  finally:
    extra.unlink()
  assert lines(folder, workdir)[-1]["step"] == 7


def test_non_finite_losses_stop_the_run(folder):
  out = run(folder, "diverged", "--config.schedule.peak=1e30", "--config.train.max_skipped=2", code=2)
  assert "2 updates in a row" in out and "Traceback" not in out
  assert lines(folder, "diverged", "events.jsonl")[-1]["reason"] == "diverged"
  assert (folder / "diverged" / "report.html").exists()


def test_a_program_gets_a_run_that_diverges_as_an_exception_and_nothing_is_printed(folder, capfd):
  config = load_config(f"{folder}/config.py", {"schedule.peak": 1e30, "train.max_skipped": 1, "log.tensorboard": False})
  with pytest.raises(Diverged, match="because gradients are not finite"):
    train.train(config, str(folder / "diverged-silent"), console=SilentConsole())
  assert capfd.readouterr() == ("", "")
  assert lines(folder, "diverged-silent", "events.jsonl")[-1]["reason"] == "diverged"


def test_an_observation_that_skips_updates_is_explained_by_its_own_words(folder, monkeypatch):
  class Lines(Console):
    def print(self, text, err=False):
      shown.append(text)

  def observe(routing, config):
    return layer_aux.observe_routing(routing, config) | {"shares": routing.weights.sum()}

  def skip_cause(config, shares):
    return ("shares are odd" if shares is None else f"shares are {shares:.0f}"), "look at the router"

  shares = Observation(is_mean=True, partial_over=("seq",), skip_cause=skip_cause)
  routing = LayerAux(observe, {**layer_aux.LAYER_AUX["routing"].observations, "shares": shares})
  monkeypatch.setitem(layer_aux.LAYER_AUX, "routing", routing)
  shown = []
  small = {"model.layers": 1, "model.first_dense_layers": 0, "model.num_mtp_layers": 0}
  fields = {"train.max_skipped": 2, "eval.every": 1, "log.tensorboard": False}
  config = load_config(f"{folder}/config.py", small | fields)
  with pytest.raises(Diverged, match="up to step 2 were skipped, the last one because shares are 1; "):
    train.train(config, str(folder / "odd-shares"), console=Lines())
  skipped = "step 1: shares are 1, update skipped (1 in a row); if this persists, look at the router"
  assert skipped in shown and not any("finite, update" in line for line in shown)
  hint = "step 1: the held-out loss is NaN. If the training loss is finite, shares are odd: look at the router"
  assert hint in shown
  assert [(line["skipped"], line["shares"]) for line in lines(folder, "odd-shares")] == [(1, pytest.approx(1))]


def test_a_run_resumes_on_other_meshes(folder, uninterrupted):
  """Checkpoints know no mesh: five steps with two stages, moments in host memory, then experts and sequences shared.

  Each is stopped, since programs to evaluate and to sample would only take time.
  """
  for axes, step, more in (
    ({"stage": 2, "tensor": 2}, 5, ["--config.optimizer.offload=true", "--config.parallel.mla_latent=sharded"]),
    ({"expert": 2, "context": 2}, 10, ["--config.parallel.zero=1", "--config.model.moe.buffer_factor=4"]),
  ):
    axes = {"data": 1, "stage": 1, "tensor": 1} | axes
    mesh = [f"--config.mesh.{axis}={size}" for axis, size in axes.items()]
    out = run_until(folder, "mesh", step, *mesh, *more, "--config.eval.every=100")
    assert ("bubble" in out) == (axes["stage"] > 1) and f"stopped by SIGINT at step {step}" in out
  assert [line["loss"] for line in lines(folder, "mesh")] == pytest.approx(uninterrupted[2][:10], abs=2e-5)


def test_generate_continues_the_prompt(folder, uninterrupted, capsys):
  def generate(*arguments):
    """What goes to stdout; the next test starts a process as a user does."""
    assert generate_main(["generate", f"--workdir={folder}/reference", "--prompt=def x", *arguments]) == 0
    out, err = capsys.readouterr()
    assert "checkpoint of step 12" in err
    return out

  first = generate("--max_tokens=1.2e1", "--seed=1")
  assert first.startswith("def x") and len(first) > len("def x\n")
  assert generate("--max_tokens=12", "--seed=1") == first
  assert generate("--max_tokens=12", "--temperature=0") == generate("--max_tokens=12", "--temperature=0", "--seed=5")


def test_a_published_v3_is_trained_on_and_goes_back(folder):
  """With router bias and multi-token prediction: names and shapes stay, and tensors move as far as two updates can."""
  published, written = folder / "published", folder / "written"
  published.mkdir()
  before = write_folder(published, Case(HUGGING_FACE))
  out = run(folder, "continued", f"--config.init_from={published}", "--config.train.steps=2")
  assert f"start    from the weights in {published}" in out
  call(checkpoint_main, "convert", f"--from={folder}/continued", f"--to={written}")
  reader = HFReader(written)
  after = {name: reader.read(name) for name in reader.names}
  assert {name: a.shape for name, a in after.items()} == {name: a.shape for name, a in before.items()}
  moved = {name: np.abs(after[name] - before[name]).max() for name in before}
  assert {name: far for name, far in moved.items() if not 0 < far < 0.03} == {}
  assert program("generate", f"--workdir={folder}/continued", "--prompt=def x", "--max_tokens=3").startswith("def x")


def test_deepseeks_own_model_args_become_a_config_that_train_takes(tmp_path):
  (tmp_path / "args.json").write_text('{"dtype": "bf16"}')  # what a ModelArgs leaves out is V2-Lite
  call(checkpoint_main, "convert", f"--from_model_args={tmp_path}/args.json", f"--to={tmp_path}/config.json")
  out = call(train.main, f"--config={tmp_path}/config.json", "--dry_run")
  assert "parameters       15,706,484,224 (2,661,150,208 active" in out and "data.tokenizer = 'deepseek-llm'" in out


def test_errors_of_the_workdir_and_the_data_exit_2(folder, tmp_path):
  out = run(folder, "bad", "--config.data.sources=/no/such/folder", code=2)
  assert "/no/such/folder" in out and "Traceback" not in out
  (folder / "file").write_text("")
  out = run(folder, "file", code=2)
  assert str(folder / "file") in out and "Traceback" not in out
  for name in ("metrics.jsonl", "events.jsonl"):
    (folder / "odd" / name).mkdir(parents=True)
    out = run(folder, "odd", code=2)
    assert f"{name}: Is a directory; move it away, or use another --workdir" in out and "Traceback" not in out
    (folder / "odd" / name).rmdir()
  assert "no checkpoint in" in call(generate_main, f"--workdir={tmp_path}", code=2)
