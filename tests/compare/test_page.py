import re

import pytest

from deepseek_jax.compare.comparison import compare_runs
from tests.compare.records import write_run, write_seeds
from tests.training.test_report import Page

VOID = ("input", "wbr")


def make_page(comparison):
  source = comparison.html()
  return Page(re.sub(rf"<({'|'.join(VOID)})([^>]*)>", r"<\1\2/>", source)), source


@pytest.fixture
def two_groups(tmp_path):
  write_seeds(tmp_path, "a", {0: 4.0, 1: 4.2, 2: 4.1})
  write_seeds(tmp_path, "b", {0: 5.0}, {"schedule.peak": 0.5})
  return tmp_path


def test_the_page_needs_nothing_from_elsewhere(two_groups):
  page, source = make_page(compare_runs(two_groups))
  assert not {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
  assert not [a for _, attributes in page.elements for a in attributes if a in ("src", "href") or a.startswith("on")]
  assert not re.search(r"https?:|url\(|@import", source)
  assert "default-src 'none'" in source and "prefers-color-scheme: dark" in source


def test_every_axis_has_a_tab_and_the_asked_one_is_open(two_groups):
  page, _ = make_page(compare_runs(two_groups, x_axis="flops"))
  inputs = [attributes for tag, attributes in page.elements if tag == "input"]
  assert [i["id"] for i in inputs] == ["x-steps", "x-tokens", "x-flops", "x-seconds"]
  assert [i["id"] for i in inputs if "checked" in i] == ["x-flops"]
  assert page.source.count("<svg") == 4 * 2 * 2  # axes, metrics, whole and second half
  assert "at 40.96G FLOPs" in page.source and "at step 40" in page.source


def test_an_axis_that_no_run_has_has_no_tab(tmp_path):
  write_run(tmp_path / "a", tokens=lambda step: float("nan"), step_seconds=lambda step: 0.1)
  page, _ = make_page(compare_runs(tmp_path, x_axis="tokens"))
  inputs = [attributes for tag, attributes in page.elements if tag == "input"]
  assert [(i["id"], "checked" in i) for i in inputs] == [("x-steps", True), ("x-seconds", False)]


def test_seeds_of_a_group_share_a_color_and_have_a_mean(two_groups):
  _, source = make_page(compare_runs(two_groups))
  panel = source[source.index('class="panel steps"') :]
  chart = panel[panel.index("<svg") : panel.index("</svg>")]
  assert len(re.findall(r'<path class="curve s0 thin"', chart)) == 3
  assert (
    len(re.findall(r'<path class="curve s0" ', chart)) == 1 and len(re.findall(r'<path class="curve s1" ', chart)) == 1
  )
  assert len(re.findall(r'<circle class="s0"', chart)) == 3 * 2 and len(re.findall(r'<circle class="s1"', chart)) == 2
  assert "A peak=0.02, mean of 3: 4.125 at step 40" in chart and "a-1, held-out: 4.2 at step 40" in chart


def test_of_many_runs_only_means_are_drawn(tmp_path):
  for seed in range(5):
    for peak in range(6):
      write_run(tmp_path / f"{peak}-{seed}", {"seed": seed, "schedule.peak": 0.1 + peak}, steps=10, evals=(5, 10))
  _, source = make_page(compare_runs(tmp_path))
  assert " thin" not in source[source.index("<body>") :] and source.count('<path class="curve s5"') == 4 * 2 * 2


def test_the_page_has_what_differs_the_results_and_the_verdict(two_groups):
  page, source = make_page(compare_runs([f"{two_groups}/b-*", f"{two_groups}/a-*"], verdict=True))
  for fact in ("not enough seeds to tell", "4.1000 ± 0.2484", "0.5", "0.02", "1,234", "finished", "81.9k", "8.19e+10"):
    assert fact in page.text, fact
  assert "schedule.<wbr>peak" in source and "highest learning rate" in source


def test_text_of_runs_is_escaped_and_what_was_passed_over_is_there(tmp_path):
  evil = "<script>alert(1)</script>\x1b"
  write_run(tmp_path / "<i>a&b", {"data.sources": evil}, end=evil)
  write_run(tmp_path / "c")
  (tmp_path / "torn").mkdir()
  (tmp_path / "torn" / "config.json").write_text("{")
  page, source = make_page(compare_runs(tmp_path))
  assert "script" not in {tag for tag, _ in page.elements} and "<i>" not in source and "\x1b" not in source
  assert "&lt;script&gt;alert(1)" in source and "expected JSON" in page.text
