"""launch/slurm.sbatch, with a Slurm that runs two tasks here and starts the script again when it is asked to."""

import json
import os
import shutil
import signal
import socket
import sys

import pytest

from tests.configs import write_texts
from tests.end_to_end.test_run import environment
from tests.launch import fakes
from tests.launch.conftest import ROOT, wait_for

# In place of deepseek_jax.train: task N of attempt A ends with codes[A][N]; "wait" waits for a signal, and ends with 128 + N.
TASK = """
import json, os, signal, sys, time
code = json.loads(os.environ["CODES"])[int(os.environ.get("SLURM_RESTART_COUNT", 0))][int(os.environ["SLURM_PROCID"])]
for number in (signal.SIGINT, signal.SIGTERM):
  signal.signal(number, lambda number, _: sys.exit(128 + number))
while code == "wait": time.sleep(0.02)
sys.exit(code)
"""

# One dense layer, which compiles in no time. FAULT=data: in the first attempt task 1 cannot open its data.
CONFIG = """
import os
from ml_collections import ConfigDict

if os.environ.get("FAULT") == "data" and os.environ["SLURM_PROCID"] == "1" and "SLURM_RESTART_COUNT" not in os.environ:
  from deepseek_jax.training import loop
  def raising(*_):
    raise OSError("a disk that is away for a moment")
  loop.open_stage_data = raising

def get_config():
  return ConfigDict(dict(
    name="slurm",
    model=dict(vocab=264, embed=16, layers=1, mlp=16, compute_dtype="float32", remat="none",
               attention=dict(kind="gqa", heads=2, kv_heads=2, head_dim=8)),
    mesh=dict(fsdp=2),
    data=dict(sources=({source!r},), cache={cache!r}, seq=16, heldout_fraction=0.2),
    schedule=dict(kind="constant", peak=1e-3, warmup_steps=1),
    train=dict(steps=12, global_batch=4, microbatch=4),
    checkpoint=dict(every=3),
    eval=dict(every=1000, final_sequences=4),
    log=dict(every=1, tensorboard=False),
    sample=dict(max_tokens=0),
  ))
"""


class Slurm:
  """Runs jobs of the script in the folder `submit`, as slurmctld does."""

  def __init__(self, cluster, submit):
    self.cluster = cluster
    self.submit = submit
    (cluster.state / "tasks").write_text("2")
    self.job_id = str(61_440_000 + free_offset())
    self.attempts = 0

  def start(self, *arguments, **variables):
    """One attempt of the job. The script is a copy in a folder of Slurm's, as on a real node."""
    spool = self.cluster.state / "slurm_script"
    shutil.copy(ROOT / "launch" / "slurm.sbatch", spool)
    (self.cluster.state / "requeued").unlink(missing_ok=True)
    variables |= {"SLURM_JOB_ID": self.job_id, "SLURM_SUBMIT_DIR": str(self.submit), "PYTHON": sys.executable}
    if self.attempts:
      variables["SLURM_RESTART_COUNT"] = str(self.attempts)
    return self.cluster.start("bash", str(spool), *arguments, cwd=self.cluster.state, **variables)

  def end(self, process):
    """(exit code, whether the job was put back into the queue, what was printed) of an attempt."""
    out, _ = process.communicate(timeout=600)
    requeued = (self.cluster.state / "requeued").exists()
    self.attempts += requeued
    return process.returncode, requeued, out

  def pids(self):
    path = self.cluster.state / f"pids.{self.attempts}"
    wait_for(lambda: path.exists() and len(path.read_text().split()) == 2)
    return [int(pid) for pid in path.read_text().split()]


def free_offset():
  """A number for which jax's port of a job, 61440 + job id mod 4096, is free."""
  for offset in range(os.getpid() % 4096, os.getpid() % 4096 + 4096):
    with socket.socket() as s:
      try:
        s.bind(("", 61_440 + (61_440_000 + offset) % 4096))
      except OSError:
        continue
      return offset
  raise OSError("no free port")


@pytest.fixture
def slurm(cluster, tmp_path):
  """Jobs whose tasks end as CODES says."""
  submit = tmp_path / "submit"
  (submit / "deepseek_jax").mkdir(parents=True)
  shutil.copytree(ROOT / "launch", submit / "launch", ignore=shutil.ignore_patterns("__pycache__"))
  (submit / "deepseek_jax" / "train.py").write_text(TASK)
  return Slurm(cluster, submit)


@pytest.mark.parametrize(
  ("codes", "code", "requeued"),
  [
    ([0, 0], 0, False),
    ([2, 2], 2, False),
    ([130, 130], 130, False),
    ([42, 42], 42, True),
    ([143, 143], 143, True),
    ([1, 134], 134, True),
  ],
)
def test_the_exit_code_decides_whether_the_job_is_queued_again(slurm, codes, code, requeued):
  returned, again, out = slurm.end(slurm.start(CODES=json.dumps([codes])))
  assert (returned, again) == (code, requeued), out


def test_the_budget_is_kept_over_requeues(slurm):
  variables = {"CODES": json.dumps([[42, 42]] * 3), "MAX_RESTARTS": "2"}
  ends = [slurm.end(slurm.start(**variables)) for _ in range(3)]
  assert [again for _, again, _ in ends] == [True, True, False]
  assert "none of 2 restarts in a row is left" in ends[-1][2]


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGTERM, True), (signal.SIGINT, False)])
def test_signals_go_to_the_tasks_and_not_to_the_script(slurm, number, requeued):
  """As --signal=TERM@120 and `scancel --signal=INT` send them."""
  process = slurm.start(CODES=json.dumps([["wait", "wait"]]))
  pids = slurm.pids()
  wait_for(lambda: all(map(handles_sigterm, pids)))
  for pid in pids:
    os.kill(pid, number)
  code, again, out = slurm.end(process)
  assert (code, again) == (128 + number, requeued), out


def handles_sigterm(pid):
  """Whether the process has a handler for SIGTERM, which a task sets last."""
  with open(f"/proc/{pid}/status") as file:
    caught = next(line for line in file if line.startswith("SigCgt:"))
  return int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1


@pytest.fixture
def training(cluster, tmp_path):
  """A Slurm whose tasks train, and the arguments of the script."""
  write_texts(tmp_path / "text", files=30, words=40)
  (tmp_path / "config.py").write_text(CONFIG.format(source=str(tmp_path / "text"), cache=str(tmp_path / "cache")))
  cluster.env |= environment() | {"PATH": cluster.env["PATH"], "JAX_NUM_CPU_DEVICES": "1"}
  slurm = Slurm(cluster, ROOT)
  yield slurm, (f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run")
  (ROOT / f"restarts-{slurm.job_id}").unlink(missing_ok=True)


@pytest.mark.chaos
def test_real_training_starts_again_after_a_fault_and_not_after_a_mistake(training, tmp_path):
  slurm, arguments = training
  code, again, out = slurm.end(slurm.start(*arguments, FAULT="data"))
  assert (code, again) == (1, True) and "a disk that is away for a moment" in out, out
  code, again, out = slurm.end(slurm.start(*arguments, FAULT="data"))
  assert (code, again) == (0, False) and "2 x cpu (cpu)" in out and "2 processes" in out, out
  assert events(tmp_path)[-1]["reason"] == "finished"
  code, again, out = slurm.end(slurm.start(*arguments, "--config.train.microbatch=3"))
  assert (code, again) == (2, False) and "no restart after exit code 2" in out, out


def events(tmp_path):
  return [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]


@pytest.mark.chaos
def test_real_training_resumes_after_a_kill(training, tmp_path):
  slurm, arguments = training
  process = slurm.start(*arguments)
  manifests = lambda: list(tmp_path.glob("run/checkpoints/*/manifest.json"))
  wait_for(lambda: any(path.parent.name.isdigit() for path in manifests()) or process.poll() is not None, 600)
  os.kill(slurm.pids()[0], signal.SIGKILL)
  code, again, out = slurm.end(process)
  assert code >= 128 and again, out
  code, again, out = slurm.end(slurm.start(*arguments))
  assert (code, again) == (0, False), out
  assert [event["event"] for event in events(tmp_path)].count("resume") == 1
  assert events(tmp_path)[-1]["reason"] == "finished"


def test_the_script_asks_for_what_it_relies_on():
  script = ROOT / "launch" / "slurm.sbatch"
  options = fakes.SBATCH.parse_args(fakes.directives(script))
  assert options.signal == "TERM@120" and options.requeue and options.open_mode == "append"


@pytest.mark.parametrize(
  ("arguments", "variables", "code", "says"),
  [
    (["--help"], {}, 0, "sbatch [OPTIONS OF SBATCH] launch/slurm.sbatch"),
    ([], {}, 2, "error: this is a batch script of Slurm: sbatch launch/slurm.sbatch"),
    ([], {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": "/"}, 2, "/ has no launch/supervise.py"),
  ],
)
def test_what_is_missing_is_named(cluster, arguments, variables, code, says):
  assert says in cluster.run("bash", "launch/slurm.sbatch", *arguments, code=code, **variables)
