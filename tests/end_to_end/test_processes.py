"""Runs of two processes, started as a user starts them, against runs of one."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from deepseek_jax.training.goodput import read_goodput
from tests.configs import RUN, write_texts
from tests.end_to_end.test_run import environment, finish, flags_of, lines, wait_for, wait_for_step
from tests.metadata_server import MetadataServer

LAUNCHER = pathlib.Path(__file__).parents[2] / "launch" / "local.py"
STEPS = 12
# On CPUs jax's key of a cached program differs from process to process, and process 0 alone writes: the others would
# compile all programs in all runs. With the key of process 0 they find what it has written.
ONE_KEY = """
import hashlib, os
from jax._src import cache_key, distributed
key_here = cache_key._hash_accelerator_config
def key_of_process_0(hasher, devices):
  here, state = hashlib.sha256(), distributed.global_state
  key_here(here, devices)
  digest = here.hexdigest()
  if state.client and state.process_id == 0:
    state.client.key_value_set("test/cache_key", digest, allow_overwrite=True)
  elif state.client:
    digest = state.client.blocking_key_value_get("test/cache_key", 60_000)
  hasher.update(digest.encode())
cache_key._hash_accelerator_config = key_of_process_0
"""
# Some arrays are as those too large to gather when the state is hashed.
LARGE_ARRAYS = """
from deepseek_jax.training import state
state.MAX_GATHERED_BYTES = 20_000
"""
# A clock of checkpoint.minutes that moves a second whenever process 0 looks at it. That of process 1 is years ahead.
CLOCKS = """
import itertools, types
fault, process = os.environ.get("FAULT"), os.environ.get("JAX_PROCESS_ID")
if fault == "clocks":
  from deepseek_jax.training import decisions
  seconds = itertools.count(10**8 * int(process), 1 + 10**8 * int(process))
  decisions.time = types.SimpleNamespace(monotonic=lambda: next(seconds))
"""
# The machine of process 1 is one of Google Cloud, with the metadata server METADATA.
METADATA = """
if process == "1" and "METADATA" in os.environ:
  from deepseek_jax.training import preemption
  os.environ["GCE_METADATA_HOST"], preemption.POLL_SECONDS = os.environ["METADATA"], 0.01
"""
# The samples of each step go to the file SAMPLES.
NOTE_SAMPLES = """
if "SAMPLES" in os.environ:
  import json
  from deepseek_jax.training import trainer
  load_batch, start_step = trainer.load_batch, trainer.Trainer.start_step
  def load_with_ids(data, train, ids, sharding):
    batch = load_batch(data, train, ids, sharding)
    object.__setattr__(batch, "ids", ids.tolist())  # of a frozen dataclass
    return batch
  def note_and_start_step(self, batch, consumed):
    with open(os.environ["SAMPLES"], "a") as file:
      file.write(json.dumps([self.step, batch.ids]) + "\\n")
    return start_step(self, batch, consumed)
  trainer.load_batch, trainer.Trainer.start_step = load_with_ids, note_and_start_step
"""
# Faults of process 1, named by the variable FAULT.
FAULTS = """
if fault and process == "1":
  from deepseek_jax.errors import ConfigError
  from deepseek_jax.training import loop, trainer
  def raising(*_):
    if fault == "data":
      raise ConfigError("only this process cannot read its data")
    raise KeyError("a mistake in the code")
  def save_on_a_full_disk(self, *arguments, **options):
    if len(self.steps()) == 1:
      resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    return save(self, *arguments, **options)
  def hang():
    import time
    time.sleep(1000)
  def slow(load, hang_at=10**9):
    calls = []
    def slow_load(*arguments, **options):
      import time
      calls.append(0)
      time.sleep(1000 if len(calls) == hang_at else 0.5 * (fault == "slow data"))
      return load(*arguments, **options)
    return slow_load
  if fault == "data":
    loop.open_stage_data = raising
  elif fault == "slow data":
    trainer.load_batch = slow(trainer.load_batch)
  elif fault == "hang in data":
    trainer.load_batch = slow(trainer.load_batch, hang_at=8)
  elif fault == "hang in a step":
    start_step = trainer.Trainer.start_step
    def start_step_late(self, *arguments):
      if self.step == 7:
        hang()
      return start_step(self, *arguments)
    trainer.Trainer.start_step = start_step_late
  elif fault == "hang in a save":
    from deepseek_jax.checkpoint.manager import Checkpointer
    save = Checkpointer.save
    def save_late(self, step, *arguments, **options):
      if step == 6:
        hang()
      return save(self, step, *arguments, **options)
    Checkpointer.save = save_late
  elif fault == "code":
    trainer.Trainer.load_state = raising
  elif fault in ("8", "20"):  # sequences of the evaluation that is stopped
    import signal
    from deepseek_jax.evaluate import heldout
    evaluate = heldout.evaluate
    def evaluate_stopped(*arguments):
      if arguments[-1] == int(fault):
        signal.raise_signal(signal.SIGTERM)
      return evaluate(*arguments)
    heldout.evaluate = evaluate_stopped
  elif fault == "disk":
    import resource
    from deepseek_jax.checkpoint.manager import Checkpointer
    save = Checkpointer.save
    Checkpointer.save = save_on_a_full_disk
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with a config and its text; few layers, that compiling takes less."""
  folder = tmp_path_factory.mktemp("processes")
  write_texts(folder / "text", files=30, words=40)
  config = RUN.format(source=str(folder / "text"), cache=str(folder / "cache"), steps=STEPS)
  config = (
    config.replace("layers=3", "layers=2")
    .replace("num_mtp_layers=1", "num_mtp_layers=0")
    .replace("log=dict(", "log=dict(tensorboard=False, ")
  )
  (folder / "config.py").write_text(ONE_KEY + LARGE_ARRAYS + CLOCKS + METADATA + NOTE_SAMPLES + FAULTS + config)
  return folder


def train(folder, workdir, *arguments, processes=1, devices=1, **variables):
  """A run of as many `processes` with as many `devices` each."""
  command = [sys.executable, "-m", "deepseek_jax.train", *flags_of(folder, workdir)]
  if processes > 1:
    command = [sys.executable, LAUNCHER, f"--processes={processes}", f"--devices={devices}", "--", *command]
  else:
    variables["JAX_NUM_CPU_DEVICES"] = str(devices)
  return subprocess.Popen(
    [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment() | variables
  )


def column(folder, workdir, key):
  return [line[key] for line in lines(folder, workdir)]


def last_event(folder, workdir):
  return lines(folder, workdir, "events.jsonl")[-1]


FSDP = ("--config.mesh.fsdp=2",)
LONG = "--config.train.steps=80"


@pytest.fixture(scope="module")
def alone(folder):
  """The workdir of a run of one process with two devices."""
  finish(train(folder, "alone", *FSDP, devices=2))
  return "alone"


@pytest.fixture(scope="module")
def stopped(folder):
  """(workdir, output) of a run of two processes, of which the second got SIGTERM; none compiles what `alone` did."""
  process = train(folder, "stopped", *FSDP, processes=2)
  wait_for_step(folder, "stopped", 4, process)
  os.kill(member(process.pid, 1), signal.SIGTERM)
  return "stopped", finish(process, 143)


def members(launcher):
  """{index: process id} of the processes that `launcher` started."""
  found = {}
  for pid in pathlib.Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
    for variable in pathlib.Path(f"/proc/{pid}/environ").read_text().split("\0"):
      if variable.startswith("JAX_PROCESS_ID="):
        found[int(variable.partition("=")[2])] = int(pid)
  return found


def member(launcher, index):
  """The process id of the process `index` that `launcher` started."""
  return members(launcher)[index]


def test_a_signal_to_one_process_stops_all_at_one_step(folder, alone, stopped):
  workdir, out = stopped
  end = last_event(folder, workdir)
  assert end["reason"] == "SIGTERM" and f"stopped by SIGTERM to process 1 at step {end['step']}, saved" in out
  assert 4 <= end["step"] < STEPS
  assert out.count("stopped by") == 1 and "devices  2 x cpu (cpu)" in out and "2 processes" in out
  assert str(end["step"]) in os.listdir(folder / workdir / "checkpoints")
  manifest = json.loads((folder / workdir / "checkpoints" / str(end["step"]) / "manifest.json").read_text())
  assert any("ocdbt.process_1/" in name for name in manifest["files"])


@pytest.mark.chaos
def test_the_process_that_is_slow_is_named(folder):
  workdir = "slow"
  rarely = [f"--config.{section}.every=100" for section in ("eval", "checkpoint")]
  out = finish(train(folder, workdir, *FSDP, *rarely, processes=2, FAULT="slow data"))
  assert out.count("process 1 holds the others up: 0.") == 1 and "process 0 holds" not in out
  named = [line for line in lines(folder, workdir) if "straggler" in line]
  assert named and all(line["straggler"] == line["slowest_process"] == 1 for line in named)
  assert all(line["host_seconds_max"] > 1.2 * line["host_seconds_median"] for line in named)
  assert "A process holds the others up" in (folder / workdir / "report.html").read_text()


def test_two_processes_resume_and_end_bitwise_as_one_with_their_mesh(folder, alone, stopped):
  workdir = shutil.copytree(folder / stopped[0], folder / "resumed").name
  out = finish(train(folder, workdir, *FSDP, processes=2))
  assert f"resume   from the checkpoint of step {last_event(folder, stopped[0])['step']}" in out
  for key in ("step", "loss", "grad_norm", "samples"):
    assert column(folder, workdir, key) == column(folder, alone, key)
  assert last_event(folder, workdir)["state_sha256"] == last_event(folder, alone)["state_sha256"]
  for name in ("eval", "sample"):
    ours, theirs = ([e for e in lines(folder, w, "events.jsonl") if e["event"] == name] for w in (workdir, alone))
    assert [e | {"time": 0} for e in ours] == [e | {"time": 0} for e in theirs]
  assert sorted(p.name for p in (folder / workdir).iterdir()) == sorted(p.name for p in (folder / alone).iterdir())


@pytest.mark.chaos
def test_two_processes_in_a_bucket_end_as_on_disk_and_the_first_alone_fetches(folder, alone, buckets):
  for path in (folder / "text").iterdir():
    buckets.put("bucket-a", f"text/{path.name}", path.read_bytes())
  texts = {f"text/{path.name}": 1 for path in (folder / "text").iterdir()}
  options = [*FSDP, "--workdir=gs://bucket-a/run", "--config.data.sources=gs://bucket-a/text/*.txt"]
  for says, fetched in (
    ("from scratch", texts),
    ("finished already", {f"run/{name}.jsonl": 1 for name in ("metrics", "events", "goodput")}),
  ):
    buckets.log.clear()
    buckets.sent.clear()
    assert says in finish(train(folder, "", *options, processes=2))
    assert len([key for method, key in buckets.log if method == "POST" and ".probe-" in key]) == 1
    assert {key: n for key, n in buckets.sent.items() if key.endswith((".txt", ".jsonl"))} == fetched
  end = json.loads(buckets.objects["bucket-a"]["run/events.jsonl"].content.splitlines()[-1])
  assert end["state_sha256"] == last_event(folder, alone)["state_sha256"]


@pytest.mark.chaos
def test_from_two_processes_to_one_and_back_on_other_meshes(folder, alone, stopped):
  workdir = shutil.copytree(folder / stopped[0], folder / "moved").name
  step = last_event(folder, workdir)["step"] + 3
  finish(train(folder, workdir, f"--config.train.steps={step}"))
  out = finish(train(folder, workdir, "--config.mesh.expert=2", processes=2))
  assert f"resume   from the checkpoint of step {step}" in out
  assert column(folder, workdir, "samples") == column(folder, alone, "samples")
  assert column(folder, workdir, "loss") == pytest.approx(column(folder, alone, "loss"), abs=2e-5)


@pytest.mark.parametrize(
  ("fault", "code", "says"),
  [
    ("data", 2, "process 1: error: only this process cannot read its data\n"),
    ("code", 1, "process 1: KeyError: 'a mistake in the code'\n"),
  ],
)
def test_an_error_of_one_process_ends_both_at_once(folder, fault, code, says):
  process = train(folder, fault, *FSDP, processes=2, FAULT=fault)
  assert any("[Gloo] Rank 0" in line for line in process.stdout)  # reads as far as that
  started = time.monotonic()
  out = finish(process, code)
  assert time.monotonic() - started < 20
  assert out.count(says) == 1 and f"launch: process 1 failed with exit code {code}\n" in out
  assert ("Traceback" in out) == (fault == "code")


@pytest.mark.chaos
def test_the_clock_of_process_0_decides_when_both_save_and_a_notice_to_one_machine_ends_both(folder, alone):
  # 3 s; an evaluation would look at the clock as well.
  arguments = (
    *FSDP, "--config.checkpoint.every=100", "--config.checkpoint.minutes=0.05", "--config.eval.every=100",
  )  # fmt: skip
  with MetadataServer() as server:
    process = train(folder, "clocks", *arguments, processes=2, FAULT="clocks", METADATA=server.host)
    wait_for_step(folder, "clocks", 9, process)
    server.values["preempted"] = "TRUE"
    out = finish(process, 143)
  end = last_event(folder, "clocks")
  assert end["reason"] == "PREEMPTED" and 9 <= end["step"] < STEPS
  assert f"stopping at step {end['step']} for Google Cloud's notice of preemption to process 1\n" in out
  saved = {int(path.name) for path in (folder / "clocks" / "checkpoints").iterdir() if path.name.isdigit()}
  # Due after step 3, at which process 0 has looked for the third time: the next step is saved.
  assert saved == {4, 8, end["step"]}
  finish(train(folder, "clocks", *arguments, processes=2))
  assert last_event(folder, "clocks")["state_sha256"] == last_event(folder, alone)["state_sha256"]


@pytest.mark.chaos
def test_a_signal_to_one_process_in_an_evaluation_ends_both_saved_at_its_step(folder, alone):
  out = finish(train(folder, "between", *FSDP, processes=2, FAULT="8"), 143)
  assert last_event(folder, "between")["step"] == 5 and "stopping at step 5 for SIGTERM to process 1\n" in out
  assert "held-out loss" not in out
  finish(train(folder, "between", *FSDP, processes=2))
  assert last_event(folder, "between")["state_sha256"] == last_event(folder, alone)["state_sha256"]
  assert [e["step"] for e in lines(folder, "between", "events.jsonl") if e["event"] == "eval"] == [5, 10, STEPS]


@pytest.mark.chaos
def test_a_signal_to_one_process_in_the_final_evaluation_ends_both_saved(folder, alone):
  out = finish(train(folder, "evaluated", *FSDP, processes=2, FAULT="20"), 143)
  end = last_event(folder, "evaluated")
  assert (end["reason"], end["step"], end["state_sha256"]) == (
    "SIGTERM",
    STEPS,
    last_event(folder, alone)["state_sha256"],
  )
  assert f"stopped by SIGTERM to process 1 at step {STEPS}, saved" in out and "Traceback" not in out
  assert "holds the others up" not in out


@pytest.mark.chaos
@pytest.mark.parametrize(
  ("fault", "does"),
  [
    ("hang in data", "process 1: waiting for the next batch; process 0: waiting for the device"),
    ("hang in a step", "process 1: preparing or logging a step; process 0: waiting for the device"),
    ("hang in a save", "saving a checkpoint"),
  ],
)
def test_a_process_that_hangs_ends_both_with_their_stacks_and_the_same_command_resumes(folder, alone, fault, does):
  workdir = fault.replace(" ", "_")
  limits = [f"--config.watchdog.{name}_seconds=6" for name in ("step", "checkpoint")]
  process = train(folder, workdir, *FSDP, *limits, processes=2, FAULT=fault)
  wait_for_step(folder, workdir, 6, process)
  started = time.monotonic()
  out = finish(process, 42)
  assert time.monotonic() - started < 60
  assert "error: hang: no progress for " in out and does in out.partition("\nhang: ")[2] and "exit code 42" in out
  stacks = [path.read_text() for path in sorted((folder / workdir / "hangs").glob("*.process_*.txt"))]
  assert len(stacks) == 2 and sum("time.sleep(1000)" in text or "slow_load" in text for text in stacks) == 1
  end = last_event(folder, workdir)
  assert (end["event"], end["reason"]) == ("end", "hung") and end["error"].startswith("hang")
  out = finish(train(folder, workdir, *FSDP, *limits, processes=2))
  assert "resume   from the checkpoint" in out or fault == "hang in a save"
  assert column(folder, workdir, "loss") == column(folder, alone, "loss")
  assert last_event(folder, workdir)["state_sha256"] == last_event(folder, alone)["state_sha256"]


@pytest.mark.chaos
def test_a_save_that_fails_in_one_process_ends_both_and_older_ones_stay(folder, alone):
  out = finish(train(folder, "full", *FSDP, processes=2, FAULT="disk"), 2)
  assert "process 1: error: checkpoint" in out and "/6 could not be saved" in out and "File too large" in out
  assert [p.name for p in (folder / "full" / "checkpoints").iterdir() if p.name.isdigit()] == ["3"]
  finish(train(folder, "full", *FSDP, processes=2))
  assert last_event(folder, "full")["state_sha256"] == last_event(folder, alone)["state_sha256"]


@pytest.fixture(scope="module")
def long_run(folder):
  """The workdir of a run of one process with two devices, which is long enough to be ended twenty times."""
  finish(train(folder, "long", *FSDP, LONG, devices=2, SAMPLES=str(folder / "long.samples")))
  return "long"


def samples(folder, workdir):
  """{step: samples of its batch}, which are the same in all processes and however often the step was made."""
  batches = {}
  for line in (folder / f"{workdir}.samples").read_text().splitlines():
    step, ids = json.loads(line)
    assert batches.setdefault(step, ids) == ids, step
  return batches


def assert_ends_as(folder, workdir, reference):
  """Trains to the end: state, losses and samples are those of `reference`."""
  finish(train(folder, workdir, *FSDP, LONG, processes=2, SAMPLES=str(folder / f"{workdir}.samples")))
  assert last_event(folder, workdir)["state_sha256"] == last_event(folder, reference)["state_sha256"]
  for key in ("step", "loss", "grad_norm", "samples"):
    assert column(folder, workdir, key) == column(folder, reference, key)
  assert samples(folder, workdir) == samples(folder, reference)


def random_moments():
  """A random.Random; its seed is shown with a failure."""
  seed = random.randrange(10**6)
  print("seed of the moments:", seed)
  return random.Random(seed)


def logged_steps(folder, workdir):
  path = folder / workdir / "metrics.jsonl"
  return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.chaos
def test_kill_9_of_either_process_20_times_resumes_bitwise(folder, long_run):
  rng, first = random_moments(), time.time()
  for _ in range(20):
    process = train(folder, "killed", *FSDP, LONG, processes=2, SAMPLES=str(folder / "killed.samples"))
    wait_for_step(folder, "killed", logged_steps(folder, "killed") + rng.randrange(1, 4), process)
    time.sleep(rng.random() * 0.05)
    os.kill(member(process.pid, rng.randrange(2)), signal.SIGKILL)
    started = time.monotonic()
    finish(process, 128 + signal.SIGKILL)
    assert time.monotonic() - started < 20
  assert_ends_as(folder, "killed", long_run)
  path = folder / "killed" / "goodput.jsonl"
  assert read_goodput(path.parent).total == pytest.approx(path.stat().st_mtime - first, rel=0.01)


@pytest.mark.chaos
def test_sigterm_at_random_moments_of_the_start_and_of_training_resumes_bitwise(folder, long_run):
  rng, seconds_to_first_step = random_moments(), None
  for i in range(10):
    started = time.monotonic()
    process = train(folder, "terminated", *FSDP, LONG, processes=2, SAMPLES=str(folder / "terminated.samples"))
    wait_for(lambda process=process: len(members(process.pid)) == 2, process)
    if i % 2:  # imports, connecting, data, restoring, compiling
      time.sleep(rng.uniform(0, seconds_to_first_step))
    else:  # steps, evaluations, saves
      wait_for_step(folder, "terminated", logged_steps(folder, "terminated") + rng.randrange(1, 5), process)
      seconds_to_first_step = seconds_to_first_step or time.monotonic() - started
      time.sleep(rng.random() * 0.1)
    os.kill(rng.choice([process.pid, *members(process.pid).values()]), signal.SIGTERM)
    finish(process, 143)
  assert_ends_as(folder, "terminated", long_run)


@pytest.mark.chaos
def test_a_flipped_bit_in_the_newest_checkpoint_sends_both_processes_to_the_one_before(folder, alone, stopped):
  workdir = shutil.copytree(folder / stopped[0], folder / "flipped").name
  rng, step = random_moments(), last_event(folder, workdir)["step"]
  newest = folder / workdir / "checkpoints" / str(step)
  data = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
  content = bytearray(data.read_bytes())
  content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  data.write_bytes(content)
  out = finish(train(folder, workdir, *FSDP, processes=2))
  assert f"checkpoints/{step} rejected" in out and (newest.parent / f"{step}.rejected").exists()
  assert last_event(folder, workdir)["state_sha256"] == last_event(folder, alone)["state_sha256"]


@pytest.mark.chaos
def test_two_processes_of_two_devices_equal_one_of_four_in_float64(folder):
  options = ["--config.model.param_dtype=float64", "--config.model.compute_dtype=float64"]
  options += ["--config.optimizer.moments_dtype=float64", "--config.mesh.fsdp=2", "--config.mesh.expert=2"]
  for workdir, sizes in (("four", {"devices": 4}), ("two_by_two", {"processes": 2, "devices": 2})):
    finish(train(folder, workdir, *options, **sizes, JAX_ENABLE_X64="1"))
  assert column(folder, "two_by_two", "loss") == pytest.approx(column(folder, "four", "loss"), abs=1e-10)
  assert last_event(folder, "two_by_two")["step"] == STEPS
