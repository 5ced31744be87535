import pytest

from deepseek_jax.compare.comparison import compare_runs
from deepseek_jax.compare.verdict import NO_DIFFERENCE, NOT_ENOUGH
from deepseek_jax.errors import ConfigError
from tests.compare.records import write_run, write_seeds

OTHER = {"schedule.peak": 0.5}


def judge(tmp_path, a, b, smallest=0.0025, **b_rest):
  write_seeds(tmp_path, "a", a)
  write_seeds(tmp_path, "b", b, OTHER, **b_rest)
  return compare_runs([f"{tmp_path}/a-*", f"{tmp_path}/b-*"], verdict=True, smallest=smallest).verdict


@pytest.mark.parametrize(
  ("a", "b", "outcome", "says"),
  [
    ({0: 3.9, 1: 4.1, 2: 4.0}, {0: 4.0, 1: 4.21, 2: 4.1}, "A is better", "paired over 3 seeds: 0, 1, 2"),
    ({0: 4.0, 1: 4.21, 2: 4.1}, {0: 3.9, 1: 4.1, 2: 4.0}, "B is better", "B is better: peak=0.5"),
    (
      {0: 4.0, 1: 4.01},
      {5: 3.0, 6: 3.01},
      "B is better",
      "not paired (Welch): seeds 0, 1 of the one, 5, 6 of the other",
    ),
    ({0: 3.9, 1: 4.0, 2: 4.1}, {0: 3.901, 1: 4.0, 2: 4.099}, NO_DIFFERENCE, "of 0.0100 bits per byte or more"),
    ({0: 4.0, 1: 4.1, 2: 4.3}, {0: 4.2, 1: 4.1, 2: 4.2}, NOT_ENOUGH, "an interval of ± 0.0104 takes about"),
    ({0: 4.0}, {0: 4.2}, NOT_ENOUGH, "no spread was seen yet"),
    ({0: 4.0, 1: 4.1}, {0: 4.2}, NOT_ENOUGH, "two seeds that are in both groups, or two of each"),
    ({0: 4.0, 1: 4.00001, 2: 4.0}, {0: 4.001, 1: 4.001, 2: 4.001}, "A is better", "but by less than 0.0100"),
  ],
)
def test_the_seeds_decide(tmp_path, a, b, outcome, says):
  verdict = judge(tmp_path, a, b)
  lines = list(verdict.lines())
  assert verdict.outcome == outcome and lines[0].startswith(outcome)
  assert says in "\n".join(lines)


def test_more_seeds_settle_what_few_could_not(tmp_path):
  """As many seeds as the verdict asks for, with the same spread, give an interval of the width it promises."""
  verdict = judge(tmp_path / "few", {0: 4.00, 1: 4.02, 2: 4.01}, {0: 4.01, 1: 4.01, 2: 4.012})
  assert verdict.outcome == NOT_ENOUGH and 3 < verdict.seeds_needed < 40
  n = verdict.seeds_needed + 2
  a = {seed: 4.0 + 0.01 * (seed % 3 == 1) - 0.01 * (seed % 3 == 0) for seed in range(n)}
  more = judge(tmp_path / "more", a, dict.fromkeys(range(n), 4.0))
  assert more.outcome == NO_DIFFERENCE


def test_no_fewer_seeds_are_asked_for_than_there_are(tmp_path):
  """The interval is narrow enough to lie within the smallest difference, but lies to one side."""
  differences = (0.003, 0.012, 0.008, 0.002, -0.004, 0.014)
  write_seeds(tmp_path, "a", {seed: 4.0 + d for seed, d in enumerate(differences)})
  write_seeds(tmp_path, "b", dict.fromkeys(range(6), 4.0), OTHER)
  verdict = compare_runs([f"{tmp_path}/a-*", f"{tmp_path}/b-*"], verdict=True).verdict
  text = " ".join(verdict.lines())
  assert verdict.outcome == NOT_ENOUGH and "it is ± 0.0071, but not around 0" in text and "takes about" not in text


def test_the_smallest_difference_that_matters_is_the_readers(tmp_path):
  a, b = {0: 4.0, 1: 4.1, 2: 4.2}, {0: 4.01, 1: 4.09, 2: 4.2}
  assert judge(tmp_path / "x", a, b, smallest=0.001).outcome == NOT_ENOUGH
  assert judge(tmp_path / "y", a, b, smallest=0.01).outcome == NO_DIFFERENCE


def test_what_would_mislead_is_said(tmp_path):
  write_run(tmp_path / "a-9", {"seed": 9}, final=float("nan"), end="diverged")
  verdict = judge(tmp_path, {0: 4.0, 1: 4.1}, {0: 4.0, 1: 4.1, 2: 4.0}, tokens=lambda step: step * 4096)
  notes = "\n".join(verdict.notes)
  assert "a-9 of A does not count: it has no finite held-out loss at step 40 (diverged)" in notes
  assert "seeds 2 of B have no partner" in notes
  assert "A was trained with 0.50 times the tokens of B" in notes


def test_two_folders_of_the_same_setting_are_two_groups(tmp_path):
  write_seeds(tmp_path / "one", "r", {0: 4.0, 1: 4.1})
  write_seeds(tmp_path / "two", "r", {0: 4.0, 1: 4.1})
  verdict = compare_runs([tmp_path / "one", tmp_path / "two"], verdict=True).verdict
  assert verdict.outcome == NO_DIFFERENCE and "the configs of both have the same effect" in verdict.notes[0]


def test_runs_of_two_settings_that_the_shell_has_expanded_are_two_groups(tmp_path):
  write_seeds(tmp_path, "a", {0: 4.0, 1: 4.1})
  write_seeds(tmp_path, "b", {0: 5.0, 1: 5.1}, OTHER)
  verdict = compare_runs([tmp_path / name for name in ("b-0", "b-1", "a-0", "a-1")], verdict=True).verdict
  assert verdict.a.label == "peak=0.5" and verdict.outcome == "B is better"


def test_a_verdict_on_other_than_two_groups_is_an_error(tmp_path):
  write_seeds(tmp_path, "a", {0: 4.0})
  write_seeds(tmp_path, "b", {0: 5.0}, OTHER)
  with pytest.raises(
    ConfigError, match=r"expected runs of one setting .* got 2 settings, which differ in schedule\.peak"
  ):
    compare_runs([tmp_path, tmp_path / "a-0"], verdict=True)
  with pytest.raises(ConfigError, match="a verdict is on two groups of seeds, got runs of 1 setting at"):
    compare_runs([tmp_path / "a-0"], verdict=True)
  with pytest.raises(ConfigError, match="expected a run that the other side of the verdict has not, got none"):
    compare_runs([tmp_path / "a-0", tmp_path / "a-0"], verdict=True)
  (tmp_path / "b-0" / "config.json").write_text("{")
  with pytest.raises(ConfigError, match="got none: .*expected JSON"):
    compare_runs([tmp_path / "a-0", tmp_path / "b-0"], verdict=True)
