"""What a run leaves behind that is stopped outside of its loop, cannot write, or diverges; and how it goes on."""

import errno
import os
import random
import re
import shlex
import shutil
import signal
import threading
import time
import types

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax import train
from deepseek_jax.checkpoint.manager import Checkpointer
from deepseek_jax.errors import CheckpointError
from deepseek_jax.evaluate import heldout
from deepseek_jax.generate import decoding
from deepseek_jax.training import decisions, loop, preemption, signals, trainer
from deepseek_jax.training.metrics import AppendFile
from deepseek_jax.training.run_log import RunLog
from tests.configs import RUN, write_texts
from tests.end_to_end.test_run import call, lines, run, run_until
from tests.metadata_server import MetadataServer

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with text, a config of a small model, and a data cache."""
  folder = tmp_path_factory.mktemp("faults")
  write_texts(folder / "text", files=20, words=60)
  config = RUN.format(source=str(folder / "text"), cache=str(folder / "cache"), steps=STEPS)
  for old, new in (
    ("layers=3, first_dense_layers=1, num_mtp_layers=1", "layers=1, first_dense_layers=0, num_mtp_layers=0"),
    ("embed=32", "embed=40"),  # a model of no other test: one there compiles a step that skips all updates
    ("checkpoint=dict(every=3, keep=3)", "checkpoint=dict(every=2, keep=2)"),
    ("eval=dict(every=5", "eval=dict(every=100"),
  ):
    assert old in config
    config = config.replace(old, new)
  (folder / "config.py").write_text(config)
  return folder


@pytest.fixture(scope="module")
def digest(folder):
  """state_sha256 of a run that nothing disturbed."""
  run(folder, "reference")
  return last_event(folder, "reference")["state_sha256"]


def last_event(folder, workdir):
  return lines(folder, workdir, "events.jsonl")[-1]


def checkpoints(folder, workdir):
  return sorted(int(name) for name in os.listdir(folder / workdir / "checkpoints") if name.isdecimal())


def raising(function, action, when=lambda *arguments: True):
  """`function`, before which `action` is called where `when(*arguments)`."""

  def call(*arguments, **more):
    if when(*arguments):
      action()
    return function(*arguments, **more)

  return call


def full_disk():
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fails_after_lines(count, monkeypatch):
  """From the line of metrics after `count` on the disk is full for metrics."""
  left = [count]

  def is_too_much(file, record):
    left[0] -= file.path.endswith("metrics.jsonl")
    return left[0] < 0 and file.path.endswith("metrics.jsonl")

  monkeypatch.setattr(AppendFile, "append", raising(AppendFile.append, full_disk, is_too_much))


def assert_failed(folder, workdir, out):
  """`out` ends with one line of an error; the log ends with an event and a report that say so."""
  assert "Traceback" not in out and out.count("error: ") == 1 and out.splitlines()[-1].startswith("error: ")
  end = last_event(folder, workdir)
  assert (end["event"], end["reason"]) == ("end", "failed")
  assert "failed" in (folder / workdir / "report.html").read_text()


def test_metrics_that_cannot_be_written_stop_the_run_saved(folder, digest):
  with pytest.MonkeyPatch.context() as patch:
    fails_after_lines(3, patch)
    out = run(folder, "full", code=2)
  assert_failed(folder, "full", out)
  found = re.search(
    r"metrics.jsonl cannot be written: No space left on device; step (\d+) is saved: mend that, then", out
  )
  step = int(found[1])
  assert step in checkpoints(folder, "full") and [line["step"] for line in lines(folder, "full")] == [1, 2, 3]
  assert f"resume   from the checkpoint of step {step}" in run(folder, "full")
  assert last_event(folder, "full")["state_sha256"] == digest


def test_where_the_workdir_takes_no_checkpoint_a_temporary_folder_does_and_the_command_goes_on_there(
  folder, digest, tmp_path, monkeypatch
):
  def fail():
    raise CheckpointError("no room for a checkpoint")

  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TMPDIR", str(tmp_path))
    patch.setattr("tempfile.tempdir", None)
    fails_after_lines(3, patch)
    in_workdir = raising(
      Checkpointer.save, fail, lambda self, step, *_: "elsewhere" in str(self._directory) and step > 2
    )
    patch.setattr(Checkpointer, "save", in_workdir)
    out = run(folder, "elsewhere", code=2)
  assert_failed(folder, "elsewhere", out)
  found = re.search(r"step (\d+) is saved in (\S+): .*python\S* -m deepseek_jax.train (\S+) continues from there", out)
  assert found and os.path.dirname(found[2]) == str(tmp_path) and shlex.split(found[3]) == [f"--workdir={found[2]}"]
  assert f"resume   from the checkpoint of step {found[1]}" in call(train.main, *shlex.split(found[3]))
  assert last_event(tmp_path, os.path.basename(found[2]))["state_sha256"] == digest


def test_a_lost_line_of_tensorboard_is_a_warning_once(folder, digest):
  with pytest.MonkeyPatch.context() as patch:
    lost = raising(AppendFile.append, full_disk, lambda file, record: "tensorboard" in file.path)
    patch.setattr(AppendFile, "append", lost)
    out = run(folder, "curves")
  assert out.count("cannot be written: No space left on device; TensorBoard lacks") == 1 and "Traceback" not in out
  assert last_event(folder, "curves")["state_sha256"] == digest


def test_a_save_that_fails_in_its_thread_ends_the_run_with_an_event_and_a_report(folder, digest):
  with pytest.MonkeyPatch.context() as patch:
    failing = raising(Checkpointer._write_manifest, full_disk, lambda self: self._saving_step == 4)
    patch.setattr(Checkpointer, "_write_manifest", failing)
    out = run(folder, "async", code=2)
  assert_failed(folder, "async", out)
  assert "checkpoints/4 could not be saved" in out
  step = int(re.search(r"step (\d+) is saved: mend that", out)[1])
  assert 5 <= step <= 6 and step in checkpoints(folder, "async")
  assert "resume   from" in run(folder, "async") and last_event(folder, "async")["state_sha256"] == digest


def test_an_error_of_a_writer_or_of_the_code_is_raised_after_a_save(folder, digest, capfd):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(RunLog, "step", raising(RunLog.step, lambda: 1 / 0, lambda self, step, *_: step == 5))
    with pytest.raises(ZeroDivisionError):
      call(train.main, f"--config={folder}/config.py", f"--workdir={folder}/mistake")
  assert last_event(folder, "mistake")["error"] == "ZeroDivisionError: division by zero"
  assert max(checkpoints(folder, "mistake")) >= 5


@pytest.mark.parametrize(
  ("owner", "name"), [(loop, "load_model_tokenizer"), (loop, "open_stage_data"), (trainer.Trainer, "load_state")]
)
def test_a_signal_before_the_loop_ends_the_run_at_once(folder, digest, owner, name):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(owner, name, raising(getattr(owner, name), lambda: signal.raise_signal(signal.SIGTERM)))
    out = run(folder, name, code=143)
  assert "stopped by SIGTERM before the first step" in out and "Traceback" not in out
  end = last_event(folder, name)
  assert (end["event"], end["step"], end["reason"]) == ("end", 0, "SIGTERM")


@pytest.mark.parametrize(("module", "name"), [(heldout, "evaluate"), (decoding, "continue_prompt")])
def test_a_signal_in_the_final_evaluation_or_sample_ends_a_saved_run(folder, digest, module, name):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(module, name, raising(getattr(module, name), lambda: signal.raise_signal(signal.SIGTERM)))
    out = run(folder, name, code=143)
  assert f"stopped by SIGTERM at step {STEPS}, saved" in out and "Traceback" not in out
  end = last_event(folder, name)
  assert (end["reason"], end["step"], end["state_sha256"]) == ("SIGTERM", STEPS, digest)
  assert checkpoints(folder, name)[-1] == STEPS
  if module is heldout:
    assert "next\n" in run(folder, name) and last_event(folder, name)["reason"] == "finished"


def stop_moment(moment, monkeypatch):
  """Raises SIGUSR1 at a moment of the run at which it has something to save, or is about to."""
  owner, name, when = {
    "compile": (trainer.Trainer, "start_step", lambda self, *_: self.step == 0),
    "evaluation": (heldout, "evenly_spaced", lambda windows, sequences: sequences == 8),
    "save": (Checkpointer, "_write_manifest", lambda checkpointer: checkpointer._saving_step == 4),
  }[moment]

  def interrupt():
    if threading.current_thread() is threading.main_thread():
      signal.raise_signal(signal.SIGUSR1)
    else:  # of a save in the background, which lasts until the main thread has got it
      os.kill(os.getpid(), signal.SIGUSR1)

  monkeypatch.setattr(owner, name, raising(getattr(owner, name), interrupt, when))


@pytest.mark.parametrize(("moment", "steps"), [("compile", {1}), ("evaluation", {3}), ("save", {4, 5, 6})])
def test_a_notice_while_a_run_compiles_evaluates_or_saves_ends_it_saved(folder, digest, moment, steps):
  workdir = f"in-{moment}"
  with pytest.MonkeyPatch.context() as patch:
    stop_moment(moment, patch)
    out = run(folder, workdir, "--config.eval.every=3", "--config.eval.sequences=8", code=143)
  end = last_event(folder, workdir)
  assert end["reason"] == "SIGUSR1" and end["step"] in steps
  assert f"stopping at step {end['step']} for SIGUSR1\n" in out
  assert checkpoints(folder, workdir)[-1] == end["step"]
  evaluated = [e["step"] for e in lines(folder, workdir, "events.jsonl") if e["event"] == "eval"]
  assert (3 in evaluated) == (moment == "save")
  assert f"resume   from the checkpoint of step {end['step']}" in run(folder, workdir)
  assert last_event(folder, workdir)["state_sha256"] == digest


@pytest.fixture
def metadata(monkeypatch):
  """A metadata server, from which this machine seems to be one of Google Cloud."""
  monkeypatch.setattr(preemption, "POLL_SECONDS", 0.01)
  with MetadataServer() as server:
    monkeypatch.setenv("GCE_METADATA_HOST", server.host)
    yield server


def test_a_notice_of_google_cloud_ends_the_run_saved(folder, digest, metadata):
  def announce():
    metadata.values["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    announced.wait(20)

  announced, receive = threading.Event(), signals.StopRequest.receive
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(RunLog, "step", raising(RunLog.step, announce, lambda self, step, *_: step == 5))
    patch.setattr(signals.StopRequest, "receive", lambda request, notice: (receive(request, notice), announced.set()))
    out = run(folder, "maintained", code=143)
  assert "stopping at step 5 for Google Cloud's notice of host maintenance\n" in out
  end = last_event(folder, "maintained")
  assert (end["reason"], end["step"]) == ("MAINTENANCE", 5) and checkpoints(folder, "maintained")[-1] == 5
  # The notice stands: it does not end the run again.
  run(folder, "maintained")
  assert last_event(folder, "maintained")["state_sha256"] == digest


def test_a_notice_of_google_cloud_before_the_loop_ends_the_run_at_once(folder, metadata):
  def announce_and_wait():
    metadata.values["preempted"] = "TRUE"
    for _ in range(2000):
      time.sleep(0.01)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "open_stage_data", raising(loop.open_stage_data, announce_and_wait))
    out = run(folder, "preempted", code=143)
  assert "stopped by PREEMPTED before the first step; the same command starts again" in out
  assert last_event(folder, "preempted")["reason"] == "PREEMPTED"


@pytest.mark.parametrize("function", ["watch", "make_meshes"])
def test_a_signal_at_the_very_start_ends_the_run_at_once(folder, function):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, function, raising(getattr(loop, function), lambda: signal.raise_signal(signal.SIGTERM)))
    out = run(folder, f"in-{function}", code=143)
  assert "stopped by SIGTERM before the first step; the same command starts again" in out
  assert last_event(folder, f"in-{function}")["reason"] == "SIGTERM"


def test_minutes_save_between_the_steps_of_every(folder, digest, monkeypatch):
  seconds = [0]
  monkeypatch.setattr(decisions, "time", types.SimpleNamespace(monotonic=lambda: seconds[0]))

  def minute():
    seconds[0] += 60

  monkeypatch.setattr(RunLog, "step", raising(RunLog.step, minute))
  run(
    folder,
    "clock",
    "--config.checkpoint.every=5",
    "--config.checkpoint.minutes=1.5",
    "--config.checkpoint.keep=100",
  )
  # Due after the third step, at which two minutes have passed: the next step is saved. Step 5 counts from 0 again.
  assert checkpoints(folder, "clock") == [4, 5, 9, 10, 12]
  assert last_event(folder, "clock")["state_sha256"] == digest


def test_text_that_vanishes_stops_no_run_but_the_next_start_which_goes_on_once_it_is_back(folder, digest, tmp_path):
  text, cache = shutil.copytree(folder / "text", tmp_path / "text"), tmp_path / "cache"
  arguments = f"--config.data.sources={text}", f"--config.data.cache={cache}"

  def vanish():
    shutil.rmtree(text)
    shutil.rmtree(cache)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(RunLog, "step", raising(RunLog.step, vanish, lambda self, step, *_: step == 3))
    run_until(folder, "vanished", 7, *arguments)
  assert last_event(folder, "vanished")["step"] == 7
  *_, error = run(folder, "vanished", *arguments, code=2).splitlines()
  assert error.startswith("error: ") and str(text) in error
  shutil.copytree(folder / "text", text)
  assert "resume   from the checkpoint of step 7" in run(folder, "vanished", *arguments)
  assert last_event(folder, "vanished")["state_sha256"] == digest


def test_jumps_of_the_wall_clock_change_nothing(folder, digest, monkeypatch):
  seed = random.randrange(10**6)
  print("seed of the jumps:", seed)
  rng, wall_clock = random.Random(seed), time.time

  def jumping():
    return wall_clock() + rng.uniform(-60, 60)  # Orbax's timeouts within a save, 300 s, go by this clock

  monkeypatch.setattr(time, "time", jumping)
  monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
  minutes = "--config.checkpoint.minutes=60"
  run_until(folder, "jumps", 5, minutes)
  run(folder, "jumps", minutes)
  assert last_event(folder, "jumps")["state_sha256"] == digest
  assert [line["step"] for line in lines(folder, "jumps")] == list(range(1, STEPS + 1))
  assert all(line["tokens_per_second"] > 0 and line["step_seconds"] > 0 for line in lines(folder, "jumps"))
  assert checkpoints(folder, "jumps") == [10, 12]


def break_weights_after(step, monkeypatch):
  """The update of `step` makes weights that give no finite gradients."""
  start_step = trainer.Trainer.start_step

  def start(self, *arguments):
    step_metrics = start_step(self, *arguments)
    if self.step == step:
      params = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), self.state.params)
      self.state = type(self.state)(**{**vars(self.state), "params": params})
    return step_metrics

  monkeypatch.setattr(trainer.Trainer, "start_step", start)


def test_skipped_updates_rotate_no_checkpoint_and_a_run_that_diverged_goes_back_before_them(folder, digest):
  with pytest.MonkeyPatch.context() as patch:
    break_weights_after(6, patch)
    out = run(folder, "bad", "--config.train.max_skipped=4", code=2)
  assert "step 8: the checkpoint waits until an update is applied again" in out
  assert "the first was step 7" in out and out.splitlines()[-1].endswith("--resume_from=4") and "schedule.peak" in out
  assert checkpoints(folder, "bad") == [4, 6]  # 6 has the broken weights
  assert last_event(folder, "bad")["reason"] == "diverged"
  assert "it holds [4, 6]" in run(folder, "bad", "--resume_from=5", code=2)
  out = run(folder, "bad", "--resume_from=4")
  assert "checkpoints/6 is newer; moved to 6.rejected" in out and "resume   from the checkpoint of step 4" in out
  assert last_event(folder, "bad")["state_sha256"] == digest
  assert [line["step"] for line in lines(folder, "bad")] == list(range(1, STEPS + 1))


def test_a_stop_while_updates_are_skipped_saves_beside_the_good_checkpoints(folder, digest):
  with pytest.MonkeyPatch.context() as patch:
    break_weights_after(6, patch)
    run_until(folder, "stopped", 9)
  assert checkpoints(folder, "stopped") == [4, 6, 9]
