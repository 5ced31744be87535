"""How a run uses a report: which results count, where they are saved, and which kernels fall back to XLA."""

import dataclasses
import json

import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import load_config
from deepseek_jax.selftest import machine, run
from deepseek_jax.selftest.check import new_result
from deepseek_jax.selftest.child import results_path
from deepseek_jax.selftest.supervise import ChildFailed, Report

MACHINE = {
  "chip": "H200",
  "driver": "580",
  "jax": "0.11.2",
  "jaxlib": "0.11.2",
  "packages": "jax 0.11.2",
  "kernels": "abc",
}
# Calls by case: the second case covers two calls of the program.
CASES = {
  "attention.attention(small)": ["attention.attention", "attention.attention(large)"],
  "quantize.quantize(7168)": ["quantize.quantize", "quantize.quantize(7168)", "quantize.quantize(2048)"],
  "quantize.quantize(576)": ["quantize.quantize", "quantize.quantize(576)"],
}


class FakeSelftest:
  """In place of `run_selftest`: gives a report with `verdicts` of cases and counts calls."""

  def __init__(self, monkeypatch, tmp_path):
    self.calls, self.verdicts, self.machine, self.cases = 0, {}, dict(MACHINE), CASES
    self.error, self.folder = None, tmp_path
    monkeypatch.setattr(run, "run_selftest", self)
    monkeypatch.setattr(run, "accelerators", lambda: ["NVIDIA H200"])

  def __call__(self, config, folder, chips, *, processes, seconds):
    assert folder == self.folder / "cache" / "deepseek_jax" / "selftest" and seconds > 0
    self.calls += 1
    if self.error:
      raise self.error
    results = {
      key: new_result(key, names[0], names[1:], self.verdicts.get(key, "ok"), "the reason")
      for key, names in self.cases.items()
      if self.verdicts.get(key) != "not reached"
    }
    report = Report(dict(self.machine), dict(self.cases), results)
    self.save(folder, report)
    return report

  def save(self, folder, report):
    """As the real one does."""
    path = results_path(str(folder), machine.results_key(report.machine))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({key: dataclasses.asdict(result) for key, result in report.results.items()}))

  def select(self, workdir="run", enabled=True, processes=1, **fields):
    fields = {"data.cache": str(self.folder / "cache"), "model.precision": "fp8", **fields}
    config = load_config("configs/tiny.py", fields)
    return run.select_kernels(config, str(self.folder / workdir), processes, enabled)


@pytest.fixture
def tester(monkeypatch, tmp_path):
  return FakeSelftest(monkeypatch, tmp_path)


def test_a_failed_kernel_is_replaced_at_all_shapes_and_a_slow_one_at_those_it_stands_for(tester, capsys):
  tester.verdicts = {"attention.attention(small)": "hung", "quantize.quantize(7168)": "slow"}
  assert tester.select() == (["attention.attention"], ["quantize.quantize(2048)", "quantize.quantize(7168)"])
  out = capsys.readouterr().out
  path = tester.folder / "run" / "selftest.json"
  assert f"attention.attention hung on H200 (the reason): falling back to XLA; report: {path}; test again: " in out
  assert (
    f"quantize.quantize slow on H200 (the reason): falling back to XLA for such shapes; report: {path}; test again: "
    in out
  )
  assert "3 cases: 1 hung, 1 slow, 1 ok" in out


@pytest.mark.parametrize("verdict", ["wrong", "failed", "crashed", "hung"])
def test_every_failure_counts(tester, verdict):
  tester.verdicts = {"quantize.quantize(576)": verdict}
  assert tester.select() == (["quantize.quantize"], [])


def test_what_could_not_be_compared_or_reached_is_used(tester):
  tester.verdicts = {"attention.attention(small)": "no reference", "quantize.quantize(576)": "not reached"}
  assert tester.select() == ([], [])


def test_the_next_start_costs_nothing(tester, capsys):
  tester.verdicts = {"attention.attention(small)": "wrong"}
  first = tester.select("first")
  assert tester.calls == 1 and "once for these shapes" in capsys.readouterr().out
  assert tester.select("second") == first and tester.calls == 1
  assert "once for these shapes" not in capsys.readouterr().out
  assert json.loads((tester.folder / "second" / "selftest.json").read_text())["results"]


@pytest.mark.parametrize(
  "change",
  [{"data.seq": 64}, {"model.embed": 64}, {"train.microbatch": 2}, {"processes": 2}, {"mesh.fsdp": 2}],
  ids=str,
)
def test_other_shapes_are_tested(tester, change):
  tester.select("first")
  tester.select("second", **change)
  assert tester.calls == 2


def test_other_kernels_and_other_flags_are_tested(tester, monkeypatch):
  tester.select("first")
  monkeypatch.setattr(machine, "source_sha256", lambda: "def")
  tester.select("second")
  monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")
  tester.select("third")
  assert tester.calls == 3


def test_settings_that_no_kernel_sees_are_no_reason(tester):
  tester.select("first")
  tester.select("second", **{"seed": 3, "schedule.peak": 1e-4, "train.steps": 7})
  assert tester.calls == 1


def test_a_report_that_is_not_complete_is_not_kept_for_other_runs(tester):
  tester.verdicts = {"quantize.quantize(576)": "not reached"}
  tester.select("first")
  tester.select("second")
  assert tester.calls == 2
  tester.select("first")  # but by its own
  assert tester.calls == 2


def test_a_kernel_that_was_not_reached_stays_in_use(tester):
  """In a run that has trained on it, whatever a later test finds."""
  tester.verdicts = {"quantize.quantize(576)": "not reached"}
  tester.select()
  tester.verdicts = {"quantize.quantize(576)": "wrong"}
  assert tester.select(**{"mesh.fsdp": 2}) == ([], [])
  assert tester.select("another") == (["quantize.quantize"], [])


def test_a_resume_keeps_its_choice_also_on_another_mesh(tester):
  """Where calls that it did not make before are tested: of kernels that it knew, and of others."""
  tester.verdicts = {"attention.attention(small)": "slow"}
  tester.select()
  new = {
    "quantize.quantize(64)": ["quantize.quantize", "quantize.quantize(64)"],
    "swiglu.swiglu_quantize(64)": ["swiglu.swiglu_quantize", "swiglu.swiglu_quantize(64)"],
  }
  tester.cases = CASES | new
  tester.verdicts = {
    "quantize.quantize(64)": "slow",
    "swiglu.swiglu_quantize(64)": "wrong",
    "quantize.quantize(576)": "slow",
  }
  chosen = ["swiglu.swiglu_quantize"], ["attention.attention(large)", "quantize.quantize(64)"]
  assert tester.select(**{"mesh.fsdp": 2}) == chosen and tester.calls == 2
  assert tester.select(**{"mesh.fsdp": 2}) == chosen and tester.calls == 2


@pytest.mark.parametrize("name", ["packages", "kernels"])
def test_under_other_versions_a_resume_also_replaces_what_fails_now(tester, name):
  tester.verdicts = {"attention.attention(small)": "slow"}
  tester.select()
  tester.verdicts, tester.machine[name] = (
    {"quantize.quantize(576)": "wrong", "quantize.quantize(7168)": "slow"},
    "another",
  )
  assert tester.select(**{"mesh.fsdp": 2}) == (["quantize.quantize"], ["attention.attention(large)"])


def test_a_resume_on_another_chip_chooses_anew(tester):
  tester.verdicts = {"attention.attention(small)": "slow"}
  tester.select()
  tester.verdicts, tester.machine["chip"] = {}, "B200"
  assert tester.select(**{"mesh.fsdp": 2}) == ([], [])


def test_a_second_test_counts_for_later_runs(tester):
  """As by `selftest --again`."""
  tester.verdicts = {"attention.attention(small)": "wrong"}
  assert tester.select("first") == (["attention.attention"], [])
  tester.verdicts = {}
  tester(None, tester.folder / "cache" / "deepseek_jax" / "selftest", ["NVIDIA H200"], processes=1, seconds=1)
  assert tester.select("second") == ([], []) and tester.calls == 2
  assert tester.select("first") == (["attention.attention"], [])


def test_results_of_another_form_are_made_anew(tester):
  tester.select("first")
  (saved,) = (tester.folder / "cache").rglob("results-*.json")
  saved.write_text(json.dumps({name: {"verdict": "ok"} for name in CASES}))
  tester.select("second")
  assert tester.calls == 2


def test_that_there_is_nothing_to_test_is_kept_too(tester, capsys):
  tester.cases = {}
  assert tester.select("first") == tester.select("second") == ([], []) and tester.calls == 1
  assert "0 cases: no Pallas kernels for this config on this device" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 1}'])
def test_a_damaged_file_is_replaced(tester, content, capsys):
  (tester.folder / "run").mkdir()
  (tester.folder / "run" / "selftest.json").write_text(content)
  tester.select()
  assert tester.calls == 1 and json.loads((tester.folder / "run" / "selftest.json").read_text())["results"]
  assert "is damaged: kernels are tested again" in capsys.readouterr().out


def test_off_tests_nothing_but_keeps_a_choice(tester):
  assert tester.select(enabled=False) == ([], []) and not (tester.folder / "run").exists()
  tester.verdicts = {"attention.attention(small)": "wrong"}
  chosen = tester.select()
  assert tester.select(enabled=False) == tester.select(enabled=False, **{"mesh.fsdp": 2}) == chosen
  assert tester.calls == 1


def test_without_an_accelerator_or_a_kernel_nothing_is_tested(tester, monkeypatch):
  xla = dict.fromkeys(("model.attention.implementation", "model.fp8.implementation"), "xla")
  assert tester.select(**xla) == ([], [])
  monkeypatch.setattr(run, "accelerators", list)
  assert tester.select() == ([], []) and tester.calls == 0


def test_a_test_that_cannot_run_is_said_and_ends_nothing(tester, capsys):
  tester.error = ChildFailed("exit code 1: no such device")
  assert tester.select() == ([], [])
  assert (
    "self-test  could not run, so kernels are used untested: exit code 1: no such device\n" in capsys.readouterr().out
  )


def test_a_named_kernel_that_fails_is_an_error_and_a_slow_one_is_kept(tester, capsys):
  named = {"model.fp8.implementation": "pallas"}
  tester.verdicts = {"quantize.quantize(7168)": "slow"}
  assert tester.select("slow", **named) == ([], [])
  assert (
    "quantize.quantize slow on H200 (the reason): used nevertheless, since model.fp8.implementation=pallas"
    in capsys.readouterr().out
  )
  tester.verdicts = {"quantize.quantize(7168)": "crashed"}
  with pytest.raises(
    ConfigError, match="model.fp8.implementation=pallas, but quantize.quantize crashed on H200 .the reason.: use auto"
  ):
    tester.select("wrong", **named, **{"data.seq": 64})


def test_accelerators_are_found_without_opening_them(monkeypatch, tmp_path):
  hardware = machine.hardware_utils
  version = next(v for v in hardware.TpuVersion if v.name == "v5p")
  monkeypatch.delenv("JAX_PLATFORMS")
  monkeypatch.setattr(hardware, "num_available_tpu_chips_and_device_id", lambda: (4, version))
  assert machine.accelerators() == ["TPU v5p"] * 4
  assert machine.child_environment(machine.accelerators())["TPU_VISIBLE_CHIPS"] == "0"
  monkeypatch.setenv("TPU_VISIBLE_CHIPS", "2,3")
  assert machine.accelerators() == ["TPU v5p"] * 2
  environment = machine.child_environment(machine.accelerators())
  assert environment["TPU_VISIBLE_CHIPS"] == "2" and environment.items() >= machine.ONE_TPU_CHIP.items()
  monkeypatch.delenv("TPU_VISIBLE_CHIPS")
  monkeypatch.setattr(hardware, "num_available_tpu_chips_and_device_id", lambda: (0, None))
  monkeypatch.setattr(hardware, "has_visible_nvidia_gpu", lambda: True)
  monkeypatch.setattr(machine, "NVIDIA_GPUS", tmp_path)
  assert machine.accelerators() == ["NVIDIA GPU"]
  assert "TPU_VISIBLE_CHIPS" not in machine.child_environment(machine.accelerators())
  for number in "01":
    (tmp_path / number).mkdir()
    (tmp_path / number / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 3\n")
  assert machine.accelerators() == ["NVIDIA H200"] * 2
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert machine.accelerators() == []
