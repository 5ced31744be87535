import numpy as np
import pytest

from deepseek_jax.compare.comparison import compare_runs
from deepseek_jax.compare.groups import format_value, label_groups, letter, short_path
from tests.compare.records import write_run, write_seeds


def test_runs_that_differ_in_the_seed_alone_are_a_group(tmp_path):
  write_seeds(tmp_path, "a", {0: 4.0, 1: 4.2, 2: 4.1}, {"name": "x", "log.every": 2})
  write_seeds(tmp_path, "b", {0: 3.9}, {"schedule.peak": 0.5})
  comparison = compare_runs(tmp_path)
  a, b = comparison.groups
  assert [run.name for run in a.runs] == ["a-0", "a-1", "a-2"] and [run.name for run in b.runs] == ["b-0"]
  assert (a.label, b.label) == ("peak=0.02", "peak=0.5") and (a.letter, b.letter) == ("A", "B")
  assert [(row.path, row.values) for row in comparison.differences] == [("schedule.peak", (0.02, 0.5))]
  final = a.final()
  assert final.n == 3 and b.final().low is None
  np.testing.assert_allclose([final.mean, final.sd], [4.1, 0.1])
  np.testing.assert_allclose(final.high - final.mean, 4.302653 * 0.1 / np.sqrt(3), rtol=1e-6)


def test_runs_of_one_seed_count_once(tmp_path):
  write_seeds(tmp_path, "a", {0: 4.0, 1: 5.0})
  write_run(tmp_path / "again-0", {"seed": 0}, 4.2)
  (group,) = compare_runs(tmp_path).groups
  assert group.by_seed() == pytest.approx({0: 4.1, 1: 5.0}) and group.final().n == 2


def test_runs_that_did_not_get_as_far_do_not_count(tmp_path):
  write_seeds(tmp_path, "a", {0: 4.0, 1: 4.2})
  write_run(tmp_path / "cut", {"seed": 2}, evals=(20,), end="SIGTERM")
  write_run(tmp_path / "going", {"seed": 3}, evals=(), end=None)
  write_run(tmp_path / "nan", {"seed": 4}, final=float("nan"), end="diverged")
  (group,) = compare_runs(tmp_path).groups
  assert group.final().n == 2
  assert group.not_counted == {
    "cut": "was last evaluated at step 20 (SIGTERM)",
    "going": "was not evaluated (no end was recorded)",
    "nan": "has no finite held-out loss at step 40 (diverged)",
  }


def test_the_mean_curve_is_over_what_all_runs_have(tmp_path):
  write_seeds(tmp_path, "a", {0: 4.0, 1: 5.0})
  write_run(
    tmp_path / "short", {"seed": 2}, 6.0, steps=40, bits_per_byte=lambda s: 6 + 1 / s if s <= 30 else float("nan")
  )
  (group,) = compare_runs(tmp_path).groups
  curve = group.mean_curve("bits_per_byte", "steps")
  np.testing.assert_allclose(curve.x, np.arange(1, 31))
  np.testing.assert_allclose(curve.y, 5 + 1 / curve.x)
  assert group.mean_curve("bits_per_byte", "steps", heldout=True).x.tolist() == [20, 40]
  write_run(tmp_path / "killed", {"seed": 3}, steps=10, evals=(10,), end=None, config="tiny")
  config = (tmp_path / "a-0" / "config.json").read_text().replace('"seed": 0', '"seed": 3')
  (tmp_path / "killed" / "config.json").write_text(config)
  (group,) = compare_runs(tmp_path).groups  # a run that does not count cuts no curve
  assert group.mean_curve("bits_per_byte", "steps").x[-1] == 30 and len(group.averaged) == 3


def test_fields_of_what_a_run_has_not_are_no_differences(tmp_path):
  """Experts of a dense model, and switches that are off where they exist."""
  experts = {"model.moe.num_routed_experts": 0, "model.moe.router_bias": False, "model.first_dense_layers": 0}
  dense = {**experts, "balance.bias_update_rate": 0.0, "model.num_mtp_layers": 0}
  write_run(tmp_path / "a", dense)
  write_run(
    tmp_path / "b", {**dense, "model.moe.score": "softmax", "mtp.weights": "0.5,0.25", "balance.bias_rule": "sign"}
  )
  assert len(compare_runs(tmp_path).groups) == 1
  write_run(tmp_path / "moe")
  rows = {row.path: row.values for row in compare_runs(tmp_path).differences}
  assert rows["model.moe.num_routed_experts"] == (0, 8) or rows["model.moe.num_routed_experts"] == (None, 8)
  assert rows["model.moe.score"] == (None, "sigmoid") and rows["model.num_mtp_layers"] == (0, 1)
  assert "balance.device_loss" not in rows and "balance.bias_update_tokens" not in rows


def test_labels_are_the_fewest_fields_that_tell_groups_apart(tmp_path):
  for peak in (0.1, 0.2):
    for kind in ("adamw", "muon"):
      write_run(tmp_path / f"{kind}-{peak}", {"schedule.peak": peak, "optimizer.kind": kind, "optimizer.eps": peak})
  labels = [group.label for group in compare_runs(tmp_path).groups]
  assert labels == [
    "optimizer.kind=adamw, eps=0.1", "optimizer.kind=adamw, eps=0.2", "optimizer.kind=muon, eps=0.1",
    "optimizer.kind=muon, eps=0.2",
  ]  # fmt: skip
  assert label_groups([], ["runs/a"]) == ["runs/a"]


def test_letters_paths_and_values_are_short():
  assert [letter(i) for i in (0, 25, 26, 27, 52)] == ["A", "Z", "AA", "AB", "BA"]
  assert short_path("model.vocab") == "vocab" and short_path("model.attention.kind") == "attention.kind"
  values = {
    0.009000000000000001: "0.009", True: "true", (): "none", (1, 2.5): "1,2.5", None: "–", 10_000_000: "10000000",
    "x" * 99 + "end": "…" + "x" * 20 + "end",
  }  # fmt: skip
  assert {value: format_value(value) for value in values} == values
