import re

from deepseek_jax.compare.comparison import compare_runs
from deepseek_jax.compare.text import format_table, sparkline
from tests.compare.records import write_run, write_seeds


def test_a_table_that_is_too_wide_goes_on_below_with_its_first_column():
  lines = format_table(("run", "a", "bb", "c"), [["x", "1", "22", "333"], ["yy", "4", "5", "6"]], width=11)
  assert lines == [
    "run  a  bb", "x    1  22", "yy   4   5", "",
    "run    c", "x    333", "yy     6",
  ]  # fmt: skip
  assert len(format_table(("run", "a", "bb", "c"), [["x", "1", "22", "333"]], width=80)) == 2


def test_a_sparkline_goes_from_low_to_high():
  assert sparkline([1, 10, 100, None], 1, 100) == "▁▅█ " and sparkline([-1, 0, 1], -1, 1) == "▁▅█"
  assert sparkline([2, 2], 2, 2) == "▁▁"


def test_the_text_fits_80_columns_and_has_every_number(tmp_path):
  write_seeds(tmp_path, "baseline", {0: 4.0, 1: 4.2, 2: 4.1}, grad_norm=lambda step: step / 7)
  write_seeds(tmp_path, "a-variant-with-a-long-name", {0: 3.9, 1: 3.8}, {"schedule.peak": 0.5, "model.layers": 3})
  comparison = compare_runs(tmp_path, metrics=("bits_per_byte", "grad_norm"), x_axis="tokens")
  text = comparison.text()
  assert max(map(len, text.splitlines())) <= 80
  assert text.startswith("5 runs in 2 groups of seeds\n")
  for fact in (
    "A  layers=3: a-variant-with-a-long-name-0, a-variant-with-a-long-name-1", "B  layers=2: baseline-0, baseline-1",
    "3.8500 ± 0.6353", "4.1000 ± 0.2484", "bits per byte over tokens", "81.9k tokens", "8.19e+10", "1,234", "finished",
    "0:00:30", "1 x cpu", "5.7143",
  ):  # fmt: skip
    assert fact in re.sub(r"\n\s+", " ", text), fact
  assert re.search(r"^model\.layers +3 +2$", text, re.M) and re.search(r"^schedule\.peak +0\.5 +0\.02$", text, re.M)


def test_fifty_groups_stay_within_the_columns(tmp_path):
  for i in range(50):
    write_run(tmp_path / f"run-{i}", {"schedule.peak": 0.001 * (i + 1)}, steps=4, evals=(4,))
  text = compare_runs(tmp_path).text()
  assert max(map(len, text.splitlines())) <= 80 and "AX  peak=0.05: run-49" in text


def test_what_is_not_there_is_said(tmp_path):
  write_run(tmp_path / "a", evals=(), end=None)
  write_run(tmp_path / "b", {"name": "other", "seed": 5})
  text = compare_runs(tmp_path).text()
  assert "a of A: it was not evaluated (no end was recorded)" in text and " open" in text
  (tmp_path / "a" / "metrics.jsonl").write_text("")
  (tmp_path / "b" / "metrics.jsonl").write_text("")
  assert "none was logged over this axis" in compare_runs(tmp_path).text()
