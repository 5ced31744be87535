"""The self-test as users meet it: faulty kernels are found before a run, fall back to XLA, and do so on resume.

The processes have a fake accelerator: fake_accelerator.py, beside this file, gives XLA's implementations faults.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

from deepseek_jax.selftest.__main__ import main as selftest_main
from tests.configs import write_texts
from tests.end_to_end.test_run import call, environment, finish, lines

pytestmark = pytest.mark.jax_version

HERE, ROOT = pathlib.Path(__file__).parent, pathlib.Path(__file__).parents[2]
CONFIG = """
from ml_collections import ConfigDict

def get_config():
  return ConfigDict(dict(
    name="kernels",
    model=dict(vocab=264, embed=32, layers=1, init_std=0.1, compute_dtype="float32", precision="fp8", remat="none",
               attention=dict(heads=2, kv_heads=2, head_dim=16),
               moe=dict(num_routed_experts=2, num_experts_per_token=1, mlp=32)),
    data=dict(sources=({source!r},), cache={cache!r}, seq=32, heldout_fraction=0.2),
    train=dict(steps=4, global_batch=2),
    eval=dict(sequences=2, final_sequences=2),
    log=dict(every=1, tensorboard=False),
    sample=dict(max_tokens=0),
  ))
"""
# Attention is then the one kernel.
DENSE = "--config.model.precision=bf16", "--config.model.moe.num_routed_experts=0"
# A fault for every kernel that the config takes; the last is slow, and so replaced by shape.
FAULTS = {
  "attention.attention": "wrong",
  "quantize.quantize": "wrong",
  "quantize.quantize_both": "nan",
  "swiglu.swiglu_quantize": "exception",
  "fp8_matmul.matmul": "crash",
  "fp8_grouped_matmul.matmul": "hang",
  "fp8_grouped_matmul.wgrad": "slow",
}
VERDICTS = {"wrong": "wrong", "nan": "wrong", "exception": "failed", "crash": "crashed", "hang": "hung", "slow": "slow"}
XLA = ("--config.model.attention.implementation=xla", "--config.model.fp8.implementation=xla")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("kernels")
  write_texts(folder / "text", files=30, words=40)
  (folder / "config.py").write_text(CONFIG.format(source=str(folder / "text"), cache=str(folder / "cache")))
  return folder


def start(folder, *command, faults=None, processes=1, **variables):
  """`python -m deepseek_jax...` with `faults` of kernels; None: without the accelerator."""
  env = environment() | variables
  if faults is not None:
    (folder / "choices").mkdir(exist_ok=True)
    env |= {"FAULTS": ",".join(f"{name}={fault}" for name, fault in faults.items()), "CHOICES": str(folder / "choices")}
    env |= {"PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}", "JAX_PLATFORMS": "cpu"}
  launcher = [sys.executable, ROOT / "launch" / "local.py", f"--processes={processes}", "--"] if processes > 1 else []
  command = [*launcher, sys.executable, "-m", *command]
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def train(folder, workdir, *arguments, code=0, **kwargs):
  command = "deepseek_jax.train", f"--config={folder}/config.py", f"--workdir={folder / workdir}", *arguments
  return finish(start(folder, *command, **kwargs), code)


def digest(folder, workdir):
  return lines(folder, workdir, "events.jsonl")[-1]["state_sha256"]


def choice(folder, process=0):
  return json.loads((folder / "choices" / str(process)).read_text())


@pytest.fixture(scope="module")
def with_xla(folder):
  """The workdir of four steps with XLA's implementations, undisturbed."""
  train(folder, "xla", *XLA)
  return "xla"


@pytest.fixture(scope="module")
def faulty(folder):
  """(workdir, output) of two steps with a fault in every kernel."""
  return "faulty", train(folder, "faulty", "--config.train.steps=2", faults=FAULTS)


def test_every_fault_is_found_and_printed_in_one_line(folder, faulty):
  _, out = faulty
  for kernel, fault in FAULTS.items():
    messages = [line for line in out.splitlines() if line.startswith(f"self-test  {kernel} {VERDICTS[fault]} on cpu")]
    assert len(messages) == 1 and "falling back to XLA" in messages[0] and "faulty/selftest.json" in messages[0], (
      kernel,
      out,
    )
  functions, calls = choice(folder)
  assert functions == sorted(name for name, fault in FAULTS.items() if fault != "slow")
  assert [call.partition("(")[0] for call in calls] == ["fp8_grouped_matmul.wgrad"]


def test_a_resume_keeps_the_choice_and_ends_where_xla_does(folder, faulty, with_xla):
  """Although the kernels would pass by now, and no result is kept any more."""
  workdir, _ = faulty
  shutil.copytree(folder / workdir, folder / "resumed")
  stored, before = (folder / "resumed" / "selftest.json").read_bytes(), choice(folder)
  shutil.rmtree(folder / "cache" / "deepseek_jax" / "selftest")
  out = train(folder, "resumed", faults={})
  assert "resume   from the checkpoint of step 2" in out and "once for these shapes" not in out
  assert choice(folder) == before and (folder / "resumed" / "selftest.json").read_bytes() == stored
  assert digest(folder, "resumed") == digest(folder, with_xla)


def test_two_processes_choose_alike(folder):
  """Only process 0, which tests, could know."""
  arguments = *DENSE, "--config.train.steps=1", "--config.mesh.fsdp=2"
  out = train(folder, "two", *arguments, processes=2, faults={"attention.attention": "wrong"})
  assert "self-test  attention.attention wrong on cpu" in out
  assert choice(folder, 0) == choice(folder, 1) == [["attention.attention"], []]


def test_a_kernel_that_the_config_names_is_an_error_where_it_fails(folder):
  named = *DENSE, "--config.model.attention.implementation=pallas", f"--config.data.cache={folder}/named-cache"
  out = train(folder, "named", *named, code=2, faults={"attention.attention": "nan"})
  (error,) = (line for line in out.splitlines() if line.startswith("error: "))
  assert error.startswith(
    "error: model.attention.implementation=pallas, but attention.attention wrong on cpu (results are not finite): use auto"
  )
  assert not (folder / "named" / "checkpoints").exists()


def selftest(folder, *arguments, code=0, **kwargs):
  return finish(start(folder, "deepseek_jax.selftest", f"--config={folder}/config.py", *arguments, **kwargs), code)


def test_the_command_reports_and_keeps_results(folder):
  """A second call takes what the first one found.

  A compiler that crashes is found among kernels that compile at once, and after a kernel that takes the device with it
  the others are tested in a new process.
  """
  cache = f"--config.data.cache={folder}/reports"
  faults = {
    "swiglu.swiglu_quantize": "wrong",
    "quantize.quantize_both": "compiler",
    "fp8_grouped_matmul.matmul": "lost",
  }
  found = dict(zip(faults, ("wrong", "crashed", "failed"), strict=True))
  out = selftest(folder, cache, f"--json={folder}/report.json", faults=faults, code=1)
  report = json.loads((folder / "report.json").read_text())
  assert {"chip", "driver", "jax", "jaxlib", "kernels", "packages", "results", "not_reached"} <= set(report)
  verdicts = {(r["kernel"], r["verdict"]) for r in report["results"]}
  assert verdicts == {(name, found.get(name, "ok")) for name in FAULTS}
  for result in report["results"]:
    assert result["kernel"] in out and result["shape"] in out
    if result["verdict"] == "ok":
      assert (
        result["error"] <= result["bound"]
        and result["seconds"] > 0
        and result["xla_seconds"] > 0
        and result["rate"] > 0
      )
  second = json.loads(selftest(folder, cache, "--json=-", faults={}, code=1))
  assert second["results"] == report["results"]


def test_without_an_accelerator_there_is_nothing_to_test(folder):
  config = f"--config={folder}/config.py"
  assert "there is nothing to test" in call(selftest_main, config)
  assert "no Pallas kernel for cpu" in call(
    selftest_main, config, "--config.model.attention.implementation=pallas", code=2
  )


def test_off_tests_nothing(folder):
  out = train(folder, "off", *DENSE, "--selftest=off", "--config.train.steps=1", faults={})
  assert "self-test" not in out and choice(folder) == [[], []]


def test_a_killed_command_leaves_no_process_behind(folder):
  """Not even one that hangs in a kernel, which would hold the device."""
  process = start(
    folder, "deepseek_jax.selftest", f"--config={folder}/config.py", f"--config.data.cache={folder}/killed",
    faults={"fp8_matmul.matmul": "hang"},
  )  # fmt: skip
  hanging = folder / "choices" / "hanging"
  hanging.unlink(missing_ok=True)
  assert wait_until(hanging.exists)
  process.kill()
  process.communicate()
  assert wait_until(lambda: not pathlib.Path("/proc", hanging.read_text()).exists())


def wait_until(condition, seconds=90):
  """Whether `condition()` came true in time."""
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    time.sleep(0.05)
  return condition()
