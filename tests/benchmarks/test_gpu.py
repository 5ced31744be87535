"""benchmarks.gpu on a CPU: a rehearsal of every step, calls that are cut off, and the report."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest

from benchmarks import gpu_report
from benchmarks.attention import SHAPES
from benchmarks.gpu import machine_info, merge_tiles, topology_name
from benchmarks.gpu_steps import STEPS
from benchmarks.results import MAX_TRIES, Results, read_json, write_json
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import load_config
from deepseek_jax.plan.flops import count_parameters
from deepseek_jax.plan.plan import make_plan
from deepseek_jax.plan.topology import parse_topology
from deepseek_jax.training.step import abstract_step

ROOT = pathlib.Path(__file__).parents[2]
OLD = jax.__version_info__ < (0, 11)  # kernels for GPUs need a newer jax, so that their tiles cannot be tuned


def start(*arguments, program=("-m", "benchmarks.gpu")):
  """The process of a call, on one device."""
  env = dict(os.environ) | {"JAX_PLATFORMS": "cpu"}
  env["XLA_FLAGS"] = " ".join(flag for flag in env["XLA_FLAGS"].split() if "device_count" not in flag)
  env.pop("NPROC", None)
  return subprocess.Popen(
    [sys.executable, *program, *arguments], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )  # fmt: skip


def call(*arguments, code=0, **how):
  """What a call prints, which ends with `code`."""
  process = start(*arguments, **how)
  out, _ = process.communicate(timeout=400)
  assert process.returncode == code, out
  return out


def wait_for(condition, process):
  until = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < until and process.poll() is None, process.communicate()[0]
    time.sleep(0.05)


def rows_of(path):
  """{name: row} of the rows in a JSON that were measured."""
  return {row["name"]: row for row in (read_json(path) or {"rows": []})["rows"] if "begun" not in row}


def begun(out):
  """The steps that a call started, in order."""
  return [line.split()[1].rstrip(",") for line in out.splitlines() if line.startswith("== ") and "at most" in line]


def processes_with(text):
  """Those whose command line has it."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      found += [path] if text in path.read_text() else []
    except OSError:  # it has just ended
      continue
  return found


@pytest.mark.chaos
@pytest.mark.skipif(not pathlib.Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_rehearsal_that_is_killed_goes_on_and_is_reported(tmp_path):
  out = f"--out={tmp_path}/gpu"
  kernels, record = tmp_path / "gpu" / "fp8_matmul.json", tmp_path / "gpu" / "gpu.json"
  process = start("--part=1", "--toy", out)
  wait_for(lambda: rows_of(kernels), process)
  process.kill()
  process.wait()
  wait_for(lambda: not processes_with(str(kernels)), process=subprocess.Popen(["sleep", "60"]))
  measured = rows_of(kernels)
  assert [step["status"] for step in read_json(record)["steps"].values()] == ["done", "done", "done", "cut off"]

  assert begun(call("--part=1", "--toy", out)) == ["fp8_matmul", "attention"]
  rows = {row["name"]: row for row in read_json(record)["steps"]["fp8_matmul"]["result"]["rows"]}
  assert len(rows) == 7 and measured.items() <= rows.items()
  assert begun(call("--part=1", "--toy", out)) == []

  text = call("--part=2", "--toy", out, code=int(OLD))
  assert sorted(begun(text)) == sorted(step.name for step in STEPS if step.part == 2)
  steps = read_json(record)["steps"]
  assert {name for name, step in steps.items() if step["status"] != "done"} == ({"tune_kernels"} if OLD else set())
  for step in (step for step in STEPS if step.has_config):
    result = steps[step.name]["result"]
    assert result["tokens_per_second" if step.needs_gpu else "step_seconds"] > 0, step.name
    assert all(result["losses"]) if step.needs_gpu else result["topology"] == "h100"
  assert len(list((tmp_path / "gpu").iterdir())) == 3 - OLD, "few files come back from a machine"
  assert "== attention: done" in (tmp_path / "gpu" / "gpu.log").read_text()

  page, table = tmp_path / "kernels.md", tmp_path / "tiles.json"
  shutil.copy(ROOT / "docs" / "results" / "kernels.md", page)
  table.write_text('{"fp8_matmul": {"TPU": {"a": {}}}}')
  report = ("--page=" + str(page), f"--table={table}", out)
  call(*report, program=("-m", "benchmarks.gpu_report"))
  written = page.read_text()
  assert "Not measured yet" not in written and "A rehearsal at sizes of a test" in written
  for words in ("forward or dgrad 128 x 128 x 128", "V3 forward and backward", "| `v3_3b` | fp8 | "):
    assert words in written, words
  assert set(read_json(table)["fp8_matmul"]) == {"TPU"} | ({"cpu"} if not OLD else set())
  call(*report, program=("-m", "benchmarks.gpu_report"))
  assert page.read_text() == written


STEPS_FILE = """
import sys
from benchmarks import gpu
from benchmarks.gpu_steps import Step
from deepseek_jax.flags import run_program

def step(name, seconds, *arguments, **how):
  return Step(name, 1, seconds, (sys.argv[1] + "/step.py", *arguments), **how)

gpu.STEPS = (
  step("fails", 5, "fail"), step("rows", 30, "{json}", has_config=True), step("last", 5, "pass"),
  step("beside", 5, "{topology}", needs_gpu=False),
)
del sys.argv[1]
run_program(gpu.main)
"""
STEP = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
if sys.argv[1] in ("fail", "pass"):
  sys.exit(7 * (sys.argv[1] == "fail"))
from benchmarks.results import Results

def measure(name):
  time.sleep(0.3)
  return {{"at": time.time()}}

if sys.argv[1] != "h100":
  sys.exit(Results(sys.argv[1], {{}}).run(list("abcdefghijklmnopqrst"), measure, print))
"""


@pytest.fixture
def steps(tmp_path):
  """(program, --out, gpu.json) of a driver whose steps take a moment."""
  (tmp_path / "steps.py").write_text(STEPS_FILE)
  (tmp_path / "step.py").write_text(STEP)
  launch = "import runpy, sys; sys.path.insert(0, ''); sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])"
  program = ("-c", launch, str(tmp_path / "steps.py"), str(tmp_path))
  return program, f"--out={tmp_path}/out", tmp_path / "out" / "gpu.json"


def test_a_part_whose_time_is_over_goes_on_with_what_is_left(steps):
  program, out, record = steps
  text = call("--part=1", "--toy", out, "--seconds=4.5", program=program, code=3)
  assert begun(text)[-1] == "rows" and "not run: last; to continue: python -m benchmarks.gpu --part=1" in text
  assert "cut off: rows;" in text and "failed: fails;" in text
  first = rows_of_step(record, "rows")
  assert 1 <= len(first) < 20
  text = call("--part=1", "--toy", out, program=program, code=1)
  assert begun(text) == ["rows", "last", "fails"], "steps that failed are tried again, last"
  rows = rows_of_step(record, "rows")
  assert len(rows) == 20 and first.items() <= rows.items()
  assert {name: step["exit_code"] for name, step in read_json(record)["steps"].items()} == {
    "fails": 7, "rows": 0, "last": 0, "beside": 0,
  }  # fmt: skip
  # Another config is another step, and does not go on with results of the first, nor with what a killed call left.
  write_json(record.with_name("rows.json"), read_json(record)["steps"]["rows"]["result"])
  assert begun(call("--part=1", "--toy", out, "--config.seed=1", "--seconds=4", program=program, code=3))[0] == "rows"
  assert not rows.items() & rows_of_step(record, "rows").items()
  _, err = call("--part=1", out, program=program, code=2).splitlines()[-1].split("error: ")
  assert "give another --out" in err


def rows_of_step(record, name):
  return {row["name"]: row for row in read_json(record)["steps"][name]["result"]["rows"] if "begun" not in row}


def test_a_signal_ends_all_and_loses_nothing(steps):
  program, out, record = steps
  process = start("--part=1", "--toy", out, program=program)
  wait_for(lambda: rows_of(record.with_name("rows.json")), process)
  process.send_signal(signal.SIGTERM)
  text, _ = process.communicate(timeout=30)
  assert process.returncode == 128 + signal.SIGTERM and "cut off: rows" in text
  assert rows_of_step(record, "rows") and not processes_with(str(record.with_name("rows.json")))


@pytest.mark.parametrize(
  ("arguments", "words"),
  [((), "--part=1 or --part=2"), (("--part=3",), "part"), (("--part=1", "--config.nothing=1"), "nothing")],
)
def test_gpu_says_what_is_wrong_in_one_line(arguments, words, tmp_path):
  out = call(f"--out={tmp_path}", *arguments, code=2)
  assert out.startswith("error: ") and out.count("\n") == 1 and words in out


def test_results_go_on_where_they_were(tmp_path):
  path, tried = tmp_path / "rows.json", []

  def measure(name):
    tried.append(name)
    if name == "b" and tried.count("b") == 1:
      raise ValueError("no\nroom")
    return {"value": len(tried)}

  assert Results(path, {"chip": "x"}).run("abc", measure, print) == 1 and tried == ["a", "b", "c"]
  row = Results(path, {"chip": "x"}).rows["b"]
  assert row["failure"] == "failed: ValueError: no"
  shown = []
  assert Results(path, {"chip": "x"}).run("abcd", measure, shown.append) == 0
  assert tried[3:] == ["d", "b"], "a row that failed comes after those that never ran"
  assert [row["name"] for row in shown] == ["a", "c", "d", "b"]
  assert Results(path, {"chip": "x"}).run("abcd", measure, print, seconds=-1) == 0, "nothing is left"
  assert Results(path, {"chip": "y"}).run("ab", measure, print, seconds=-1) == 3, "another chip begins anew"


def test_a_row_that_hangs_ends_its_process_and_is_not_tried_again(tmp_path):
  code = (
    "import sys, time\nfrom benchmarks.results import Results\n"
    "def measure(name):\n  time.sleep(60 * (name == 'b'))\n  return {}\n"
    f"sys.exit(Results({str(tmp_path / 'rows.json')!r}, {{}}, row_seconds=0.5).run('abc', measure, print))"
  )
  assert "took more than 0 s" in call(program=("-c", code), code=3)
  assert "took more than" in call(program=("-c", code), code=1)
  assert set(rows_of(tmp_path / "rows.json")) == {"a", "c"}


def test_a_row_that_is_cut_off_twice_counts_as_failed(tmp_path):
  path = tmp_path / "rows.json"
  write_json(path, {"rows": [{"name": "a", "begun": MAX_TRIES - 1}]})
  results = Results(path, {})
  with pytest.raises(KeyboardInterrupt):
    results.run("a", _interrupt, print)
  row = Results(path, {}).rows["a"]
  assert "interrupted 2 times" in row["failure"] and Results(path, {}).run("a", _interrupt, print) == 1


def _interrupt(name):
  raise KeyboardInterrupt


def test_a_page_without_the_markers_is_refused(tmp_path):
  record = {"machine": machine_info() | {"chip": "NVIDIA H200"}, "toy": False, "steps": {}}
  record["steps"]["attention"] = {
    "status": "failed", "exit_code": 1, "date": "2026-01-02T03:04:05+00:00", "commit": "abc",
    "result": {"rows": [{"name": "V3 forward", "failure": "failed: no room", "begun": 1}]},
  }  # fmt: skip
  write_json(tmp_path / "gpu.json", record)
  (tmp_path / "kernels.md").write_text(gpu_report.END_MARKER + gpu_report.BEGIN_MARKER)
  with pytest.raises(ConfigError, match="must have the line"):
    gpu_report.main(["gpu_report", f"--out={tmp_path}", f"--page={tmp_path}/kernels.md", f"--table={tmp_path}/t.json"])
  with pytest.raises(ConfigError, match="there is no"):
    gpu_report.main(["gpu_report", f"--out={tmp_path}/none"])
  text = gpu_report.report(record)
  assert "`make gpu` on NVIDIA H200" in text and "at abc, 2026-01-02" in text and "rehearsal" not in text
  assert "| V3 forward | failed: no room |" in text and "Failed: attention (exit code 1)." in text
  assert "Not run: selftest_v3_fp8, " in text


def test_tiles_are_merged(tmp_path):
  write_json(tmp_path / "new.json", {"fp8_matmul": {"NVIDIA H200": {"b": {"n": 64}}}})
  write_json(tmp_path / "old.json", {"fp8_matmul": {"NVIDIA H200": {"a": {"n": 128}, "b": {"n": 128}}}})
  merge_tiles(tmp_path / "new.json", tmp_path / "old.json")
  assert read_json(tmp_path / "old.json") == {"fp8_matmul": {"NVIDIA H200": {"a": {"n": 128}, "b": {"n": 64}}}}
  merge_tiles(tmp_path / "none.json", tmp_path / "old.json")


@pytest.mark.parametrize(
  ("chip", "name"), [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("cpu", None), ("NVIDIA L4", None)]
)
def test_plans_are_for_the_chip_at_hand(chip, name):
  assert topology_name(chip) == name


@pytest.mark.parametrize(("name", "billions"), [("dense_1b", 1.22), ("v3_3b", 2.82)])
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_the_trained_configs_fit_an_h100(name, billions, implementation):
  config = load_config(f"{ROOT}/benchmarks/{name}.py", {"model.attention.implementation": implementation})
  parameters = count_parameters(config.model)
  assert round((parameters.total + parameters.mtp) / 1e9, 2) == billions
  plan = make_plan(config, parse_topology("h100"), abstract_step)
  assert plan.memory_bytes < 0.9 * plan.topology.chip.hbm_capacity
  m, moe = config.model, config.model.moe
  assert all(width % 128 == 0 for width in (m.embed, m.mlp, moe.mlp, m.attention.q_lora_rank, m.attention.kv_lora_rank))


def test_attention_counts_causal_pairs():
  shape = SHAPES["67B"]
  assert shape.flops == sum(2 * 64 * (128 + 128) * (i + 1) for i in range(4096))


def test_the_script_for_machines_without_an_index():
  done = subprocess.run(["sh", "launch/gpu.sh"], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2 and done.stderr.startswith("usage: ")
