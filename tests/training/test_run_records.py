import dataclasses
import json

import numpy as np
import pytest

from deepseek_jax.config import Config
from deepseek_jax.errors import DataError
from deepseek_jax.training.metrics import JsonlWriter
from deepseek_jax.training.run_records import read_run


def write_run(folder, rows):
  (folder / "config.json").write_text(json.dumps(dataclasses.asdict(Config(name="tiny"))))
  writer = JsonlWriter(folder, resume_step=0)
  for step, values in rows.items():
    writer.write(step, values, {})
  writer.event("eval", 2, loss=2.0)
  writer.event("eval", 2, loss=1.5)
  writer.event("eval", 1, loss=3.0)
  writer.close()


def test_metrics_are_columns_over_the_steps_that_have_them(tmp_path):
  write_run(tmp_path, {1: {"loss": 5, "skipped": 0}, 2: {"loss": float("inf")}, 4: {"loss": 3.5, "eval_seconds": 2.5}})
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 5, "los')  # killed while it wrote
  run = read_run(tmp_path)
  assert run.config["name"] == "tiny" and run.steps.tolist() == [1, 2, 4]
  assert set(run.columns) == {"loss", "skipped", "eval_seconds"}
  assert run.columns["loss"].steps.tolist() == [1, 2, 4] and len(run.columns["skipped"]) == 1
  np.testing.assert_array_equal(run.columns["loss"].values, [5, np.nan, 3.5])
  assert (run.columns["eval_seconds"].steps.tolist(), run.columns["eval_seconds"].values.tolist()) == ([4], [2.5])
  assert [(e["step"], e["loss"]) for e in run.events_by_step("eval")] == [(1, 3.0), (2, 1.5)]


def test_a_run_that_logged_nothing_has_no_columns(tmp_path):
  write_run(tmp_path, {})
  assert len(read_run(tmp_path).steps) == 0 and read_run(tmp_path).columns == {}


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "deepseek_v3"}'])
def test_a_folder_that_holds_no_run_is_named(tmp_path, content):
  if content is not None:
    (tmp_path / "config.json").write_text(content)
  with pytest.raises(DataError, match=rf"{tmp_path}/config.json: expected"):
    read_run(tmp_path)
