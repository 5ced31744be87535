import json
import re
import time

import pytest

from deepseek_jax.compare import Comparison, compare_runs
from deepseek_jax.errors import ConfigError, DataError
from deepseek_jax.json_output import to_json_text
from tests.compare.records import write_run, write_seeds


def test_damaged_and_missing_runs_are_passed_over_by_name(tmp_path):
  write_run(tmp_path / "good")
  write_run(tmp_path / "torn")
  (tmp_path / "torn" / "config.json").write_text('{"model": ')
  write_run(tmp_path / "damaged")
  (tmp_path / "damaged" / "events.jsonl").write_text("x\n")
  (tmp_path / "exported").mkdir()
  (tmp_path / "exported" / "config.json").write_text('{"model_type": "deepseek_v3"}')
  comparison = compare_runs([tmp_path, tmp_path / "none"])
  assert [run.name for run in comparison.runs] == ["good"]
  assert [path.rpartition("/")[2] for path, _ in comparison.passed_over] == ["none", "damaged", "exported", "torn"]
  reasons = " ".join(reason for _, reason in comparison.passed_over)
  for reason in ("no such folder", "events.jsonl, line 1", "that of a Hugging Face folder", "expected JSON"):
    assert reason in reasons


def test_without_a_run_there_is_no_comparison(tmp_path):
  with pytest.raises(DataError, match="expected at least one run, got none: .*no such folder"):
    compare_runs(tmp_path / "none")
  with pytest.raises(DataError, match="name folders of runs"):
    compare_runs([])


def test_a_run_that_is_named_twice_is_read_once(tmp_path):
  write_run(tmp_path / "a")
  (tmp_path / "link").symlink_to(tmp_path / "a")
  assert len(compare_runs([tmp_path / "a", f"{tmp_path}/*", tmp_path / "link"]).runs) == 1


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"x_axis": "epochs"}, "x=epochs: expected one of steps, tokens, flops, seconds"),
    ({"metrics": ["accuracy"]}, "metric=accuracy: expected one that these runs logged: bits_per_byte, "),
    ({"smallest": 0}, "smallest=0: expected a fraction between 0 and 1"),
  ],
)
def test_arguments_that_fit_nothing_are_errors(tmp_path, arguments, message):
  write_run(tmp_path / "a")
  with pytest.raises(ConfigError, match=message):
    compare_runs(tmp_path, **arguments)


def test_json_has_every_number_of_the_text(tmp_path):
  write_seeds(tmp_path, "a", {0: 4.0, 1: 4.2, 2: 4.1}, grad_norm=lambda step: step / 7)
  write_seeds(tmp_path, "b", {0: 3.9, 1: 3.8, 3: 3.7}, {"schedule.peak": 0.5}, skipped=lambda step: 3)
  write_run(tmp_path / "b-4", {"seed": 4, "schedule.peak": 0.5}, evals=(20,), end="SIGTERM")
  comparison = compare_runs(
    [f"{tmp_path}/a*", f"{tmp_path}/b*"], metrics=("bits_per_byte", "loss", "grad_norm"), verdict=True
  )
  tree = json.loads(to_json_text(comparison.to_json()))
  numbers = {
    f"{value:{spec}}"
    for value in leaves(tree)
    if isinstance(value, (int, float))
    for spec in (".4f", ".3g", ".4g", ".5g")
  }
  for group in tree["groups"]:
    final = group["final"]
    numbers |= {f"{final[name]['high'] - final[name]['mean']:.4f}" for name in final}
  difference = tree["verdict"]["difference"]
  numbers |= {f"{difference[name]:+.4f}".lstrip("+-") for name in ("mean", "low", "high")}
  text = comparison.text()
  missing = {number for number in re.findall(r"(?<![\w.-])\d\.\d{4}(?![\d%])", text) if number not in numbers}
  assert not missing
  words = json.dumps(tree)
  for line in comparison.verdict.lines():
    assert line in tree["verdict"]["text"]
  for fact in (
    "SIGTERM",
    "schedule.peak",
    "1 x cpu",
    "was last evaluated at step 20",
    '"skipped": 3',
    '"tokens": 81920',
  ):
    assert fact in words
  assert tree["groups"][0]["runs"][0]["flops"] == 81920e6 and len(tree["groups"][0]["curve"]["values"]) == 40


def leaves(tree):
  if isinstance(tree, dict):
    tree = list(tree.values())
  if isinstance(tree, list):
    return [leaf for item in tree for leaf in leaves(item)]
  return [tree]


def test_runs_are_read_from_a_bucket_which_is_only_read(tmp_path, buckets):
  from deepseek_jax.storage import ObjectStore

  for name in ("a", "b"):
    folder = write_run(tmp_path / name, {"schedule.peak": 0.1 if name == "a" else 0.2})
    for file in folder.iterdir():
      ObjectStore(f"s3://bucket-a/runs/{name}").write(file.name, file.read_bytes())
  before = dict(buckets.objects["bucket-a"])
  comparison = compare_runs("s3://bucket-a/runs")
  assert [run.place for run in comparison.runs] == ["s3://bucket-a/runs/a", "s3://bucket-a/runs/b"]
  assert [group.label for group in comparison.groups] == ["peak=0.1", "peak=0.2"]
  assert buckets.objects["bucket-a"] == before


def test_a_notebook_shows_the_page(tmp_path):
  write_run(tmp_path / "a")
  comparison = compare_runs(tmp_path)
  assert isinstance(comparison, Comparison) and repr(comparison) == comparison.text()
  assert comparison._repr_html_().startswith('<iframe srcdoc="&lt;!doctype html&gt;')


def test_fifty_runs_take_less_than_two_seconds(tmp_path):
  """Of 300 rows each, with the page; CPU time, since other work may be on the machine."""
  write_run(tmp_path / "run-0", steps=300, evals=range(30, 301, 30))
  for i in range(50):
    folder = tmp_path / f"run-{i}"
    folder.mkdir(exist_ok=True)
    for file in (tmp_path / "run-0").iterdir():
      (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["schedule"]["peak"] = 0.001 * (i + 1)  # a group each
    (folder / "config.json").write_text(json.dumps(config))
  start = time.process_time()
  comparison = compare_runs(tmp_path)
  assert comparison.text() and comparison.html() and comparison.to_json()
  assert time.process_time() - start < 2 and len(comparison.groups) == 50
