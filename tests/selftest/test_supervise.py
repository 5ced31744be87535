"""Verdicts on processes that end, hang or write nothing: a script without jax plays them."""

import json
import signal

import pytest

from deepseek_jax.flags import load_config
from deepseek_jax.selftest import supervise
from deepseek_jax.selftest.check import Result
from deepseek_jax.selftest.supervise import ChildFailed, run_selftest

# Plays the next of the scenes: lines for the journal, and at last how it ends. {"skip": ..} is what it was asked to
# leave out.
PLAYER = """
import json, os, pathlib, sys, time
request, folder = json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(__file__).parent
number = len(list(folder.glob("asked-*")))
(folder / f"asked-{number}").write_text(json.dumps(request))
for action in json.loads((folder / "scenes").read_text())[number]:
  if isinstance(action, dict):
    with open(request["journal"], "a") as f:
      f.write(json.dumps(action) + "\\n")
  elif isinstance(action, str):
    print(action, flush=True)
  elif action < 0:
    os.kill(os.getpid(), -action)
  else:
    time.sleep(action)
"""
MACHINE = {"chip": "H200", "packages": "jax", "kernels": "abc"}
CASES = {
  "quantize.quantize(a)": ["quantize.quantize", "quantize.quantize(a)"],
  "quantize.quantize(b)": ["quantize.quantize", "quantize.quantize(b)"],
  "swiglu.swiglu_quantize(c)": ["swiglu.swiglu_quantize", "swiglu.swiglu_quantize(c)"],
}
A, B, C = CASES
START = [{"machine": MACHINE}, {"cases": CASES}]
END, FOREVER = {"end": True}, 1000


def begin(phase, *keys):
  return {"begin": keys, "phase": phase}


def found(key, verdict="ok"):
  return {"key": key, "result": vars(Result(CASES[key][0], "shape", 1, False, "GB/s", verdict))}


@pytest.fixture
def play(tmp_path, monkeypatch):
  """(scenes, one a process) -> ({case: verdict}, report, what each process was asked)."""
  (tmp_path / "player.py").write_text(PLAYER)
  monkeypatch.setattr(supervise, "CHILD_COMMAND", [str(tmp_path / "player.py")])
  monkeypatch.setattr(supervise, "RETRY_SECONDS", 0.1)
  monkeypatch.setattr(supervise, "PHASE_TIMEOUTS", dict.fromkeys(supervise.PHASE_TIMEOUTS, 1.0))
  monkeypatch.setattr(supervise, "GRACE_SECONDS", 0.5)

  def run_scenes(*scenes, **kwargs):
    (tmp_path / "scenes").write_text(json.dumps(scenes))
    report = run_selftest(load_config("configs/tiny.py"), tmp_path / "results", ["NVIDIA H200"], **kwargs)
    asked = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("asked-*"))]
    assert len(asked) == len(scenes)
    return {key: result.verdict for key, result in report.results.items()}, report, asked

  return run_scenes


def test_all_is_well(play):
  verdicts, report, _ = play([*START, found(A), found(B, "slow"), found(C), END])
  assert verdicts == {A: "ok", B: "slow", C: "ok"} and report.complete and report.machine == MACHINE


def test_the_kernel_that_was_running_is_at_fault_and_its_other_shapes_are_not_tried(play):
  first = [*START, begin("compile", A, B, C), begin("kernel", A), -signal.SIGSEGV]
  verdicts, report, asked = play(first, [*START, found(C), END])
  assert verdicts == {A: "crashed", B: "crashed", C: "ok"}
  assert report.results[A].message.startswith("SIGSEGV") and "another shape" in report.results[B].message
  assert set(asked[1]["skip"]) == {A, B}


def test_a_kernel_that_hangs_is_stopped(play):
  verdicts, report, _ = play([*START, found(A), begin("time", B), FOREVER], [*START, found(C), END])
  assert verdicts == {A: "ok", B: "hung", C: "ok"} and "no event for 1.0 s (time)" in report.results[B].message


@pytest.mark.parametrize("phase", ["reference", "compare"])
def test_a_crash_of_xla_s_form_is_not_the_kernel_s(play, phase):
  verdicts, report, _ = play([*START, begin(phase, A), -signal.SIGABRT], [*START, found(B), found(C), END])
  assert verdicts == {A: "no reference", B: "ok", C: "ok"} and report.results[A].transient
  assert report.results[A].message.startswith("XLA crashed: SIGABRT")


def test_of_kernels_that_compile_at_once_the_one_at_fault_is_found(play):
  batch = [*START, begin("compile", A, B, C), -signal.SIGSEGV]
  verdicts, _, asked = play(
    batch, [*START, begin("compile", A), found(A), begin("compile", B), -signal.SIGSEGV], [*START, found(C), END]
  )
  assert verdicts == {A: "ok", B: "crashed", C: "ok"}
  assert set(asked[1]["compile_alone"]) == {A, B, C}


def test_after_the_loss_of_the_device_the_others_are_tested(play):
  lost = [*START, begin("kernel", A), found(A, "failed"), begin("device"), FOREVER]
  verdicts, _, _ = play(lost, [*START, found(B), found(C), END])
  assert verdicts == {A: "failed", B: "ok", C: "ok"}


def test_verdicts_outlive_a_process_that_cannot_start_again(play):
  busy = ["RuntimeError: the device is busy"]
  verdicts, report, _ = play([*START, found(A, "wrong"), begin("kernel", C), -signal.SIGKILL], busy, busy)
  assert verdicts == {A: "wrong", C: "crashed"} and not report.complete
  assert report.results[C].transient  # SIGKILL may come from the machine
  assert report.stopped == "exit code 0: RuntimeError: the device is busy"


def test_a_process_that_never_knows_its_cases_has_failed(play):
  with pytest.raises(ChildFailed, match="exit code 0: KeyError: what it said"):
    play([{"machine": MACHINE}, {"failed": "KeyError: what it said"}, "a line of a traceback"])
  with pytest.raises(ChildFailed, match="no event for 1.0 s .start."):
    play([{"machine": MACHINE}], [FOREVER])


def test_a_config_that_the_devices_refuse(play):
  _, report, _ = play([{"machine": MACHINE}, {"refused": "mesh.fsdp=3 needs 3 devices"}])
  assert report.refused == "mesh.fsdp=3 needs 3 devices"


def test_the_deadline_stops_what_is_under_way(play):
  """A kernel that was begun in time has hung; one that compiles may only be slow, and is left for another time."""
  verdicts, _, _ = play([*START, found(A), begin("kernel", B), FOREVER], seconds=0.3)
  assert verdicts == {A: "ok", B: "hung"}


def test_the_deadline_judges_nothing_that_compiles(play):
  verdicts, report, _ = play([*START, found(A), begin("compile", B, C), FOREVER], seconds=0.3)
  assert verdicts == {A: "ok"} and not report.complete


def test_transient_results_are_not_saved(play, tmp_path):
  play(
    [*START, found(A), begin("kernel", B), -signal.SIGSEGV],
    [*START, begin("reference", C), -signal.SIGSEGV],
    [*START, END],
  )
  (saved,) = (tmp_path / "results").glob("results-*.json")
  assert {key: r["verdict"] for key, r in json.loads(saved.read_text()).items()} == {A: "ok", B: "crashed"}


def test_a_cache_that_cannot_be_written_ends_nothing(play, tmp_path, caplog):
  (tmp_path / "results").write_text("a file")
  verdicts, _, _ = play([*START, found(A), found(B), found(C), END])
  assert set(verdicts.values()) == {"ok"} and "results are not saved" in caplog.text
