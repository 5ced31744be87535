"""--replay of runs of the command line."""

import contextlib
import io
import json
import shutil

import pytest

from deepseek_jax import train
from deepseek_jax.checkpoint.lock import lock_workdir
from deepseek_jax.errors import CheckpointError, ConfigError, DataError
from tests.configs import write_texts

CONFIG = """
from ml_collections import ConfigDict

def get_config():
  return ConfigDict(dict(
    model=dict(vocab=264, embed=16, layers=1, mlp=32, compute_dtype="float32",
               attention=dict(heads=2, kv_heads=2, head_dim=8)),
    data=dict(sources=({source!r},), cache={cache!r}, seq=32, heldout_fraction=0.2),
    mesh=dict(data=2, fsdp=2),
    schedule=dict(kind="warmup_cosine", peak=3e-3, warmup_steps=2, steps=9, factors=(0.1,)),
    train=dict(steps=9, global_batch=16, microbatch=4, batch_ramp_from=4, batch_ramp_tokens=1600),
    checkpoint=dict(every=3, keep=9),
    eval=dict(every=100, final_sequences=4),
    log=dict(every=2, tensorboard=False),
    sample=dict(max_tokens=0),
  ))
"""


def call(*arguments):
  """(exit code, what is printed) of a program."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
    code = train.main(["train", *arguments])
  return code, out.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The workdir of a run with a batch ramp that was stopped once and trained on with a stretched schedule."""
  folder = tmp_path_factory.mktemp("replay")
  write_texts(folder / "text", files=20, words=60)
  (folder / "config.py").write_text(CONFIG.format(source=str(folder / "text"), cache=str(folder / "cache")))
  flags = f"--config={folder}/config.py", f"--workdir={folder}/run"
  assert call(*flags, "--config.train.steps=6")[0] == 0
  assert call(*flags, "--config.schedule.steps=12")[0] == 0
  return folder / "run"


@pytest.fixture
def workdir(finished, tmp_path):
  """A copy of that run."""
  return shutil.copytree(finished, tmp_path / "run")


def contents(folder):
  return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.jax_version
@pytest.mark.parametrize("step, checkpoint", [(4, 3), (6, 3), (9, 6)])
def test_a_step_of_a_run_is_computed_again_bit_for_bit(finished, step, checkpoint):
  before = contents(finished)
  with lock_workdir(finished / "checkpoints"):  # as a run that is going on
    code, out = call(f"--workdir={finished}", f"--replay={step}")
  assert (code, out.count("warning")) == (0, 0), out
  assert f"from the checkpoint of step {checkpoint}" in out and "equal    bit for bit" in out
  assert ("state_sha256" in out) == (step in (6, 9))  # where a process has ended
  after = contents(finished)
  assert {path: after[path] for path in before if path.name != ".lock"} == {
    p: before[p] for p in before if p.name != ".lock"
  }
  assert after.keys() <= before.keys() | {finished / "checkpoints" / ".lock"}


def edit(path, change):
  """Applies `change` to each line of a file of JSON objects."""
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  for line in lines:
    change(line)
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_bit_that_differs_is_found(workdir):
  def tamper(line):
    if line["step"] == 8:
      line["loss"] *= 1 + 2**-22

  edit(workdir / "metrics.jsonl", tamper)
  code, out = call(f"--workdir={workdir}", "--replay=8")
  assert code == 1 and "differs  in 1 of" in out and "Step 8 is the first that differs, in loss." in out
  assert "e-07 of it" in out and "grad_norm" in out and "equal\n" in out
  assert call(f"--workdir={workdir}", "--replay=6")[0] == 0
  # A later step names the first that differs.
  code, out = call(f"--workdir={workdir}", "--replay=9")
  assert code == 1 and "differs  in 0 of" in out and "Step 8 is the first" in out


def test_what_is_other_than_in_the_run_is_a_warning(workdir):
  def tamper(line):
    if line["event"] == "start":
      line |= {"jax": "0.0.1", "commit": "another"}

  edit(workdir / "events.jsonl", tamper)
  code, out = call(f"--workdir={workdir}", "--replay=4")
  assert code == 0 and "warning  jax was '0.0.1' and is" in out and "commit was 'another'" in out


@pytest.mark.parametrize(
  "arguments, error, message",
  [
    (["--replay=7"], DataError, "the nearest logged steps are 6 and 8"),
    (["--replay=20"], DataError, "the nearest logged steps are 9"),
    (["--replay=2"], CheckpointError, "the oldest is of step 3"),
    (["--replay=4", "--config.model.compute_dtype=bfloat16"], ConfigError, "takes the config that the run has saved"),
    (["--replay=4", "--config=tiny"], ConfigError, "takes the config that the run has saved"),
  ],
)
def test_what_cannot_be_replayed_is_refused(finished, arguments, error, message):
  with pytest.raises(error, match=message):
    call(f"--workdir={finished}", *arguments)
