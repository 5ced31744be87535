import dataclasses
import json
import random

import numpy as np
import pytest

from deepseek_jax.config import Config
from deepseek_jax.errors import DataError
from deepseek_jax.training.metrics import JsonlWriter
from deepseek_jax.training.run_records import BLOCK, Column, is_number, read_run


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


def test_stretches_are_of_what_is_finite():
  column = Column(np.arange(10), np.array([0, 1, np.nan, 3, 4, 5, np.nan, 7, 8, 9.0]))
  assert [s.values.tolist() for s in column.stretches(3, least=2)] == [[0, 1, 3], [4, 5, 7], [8, 9]]
  assert [s.steps.tolist() for s in column.stretches(9, least=4)] == [[0, 1, 3, 4], [5, 7, 8, 9]]
  assert column.stretches(3, least=9) == []


def test_a_run_that_logged_nothing_has_no_columns(tmp_path):
  write_run(tmp_path, {})
  assert len(read_run(tmp_path).steps) == 0 and read_run(tmp_path).columns == {}


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "deepseek_v3"}'])
def test_a_folder_that_holds_no_run_is_named(tmp_path, content):
  if content is not None:
    (tmp_path / "config.json").write_text(content)
  with pytest.raises(DataError, match=rf"{tmp_path}/config.json: expected"):
    read_run(tmp_path)


def test_columns_keep_their_order_across_blocks_of_other_keys_and_of_nulls(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  rng, lines = random.Random(0), []
  for step in range(1, 2 * BLOCK + 10):
    keys = rng.sample(["a", "b", "c", "d"], rng.randint(0, 4))
    lines.append({"step": step} | {key: rng.choice([None, "text", 10**400, 1e301, rng.random()]) for key in keys})
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  run = read_run(tmp_path)
  assert run.steps.tolist() == [line["step"] for line in lines]
  for name in "abcd":
    rows = [line for line in lines if name in line]
    assert run.columns[name].steps.tolist() == [line["step"] for line in rows]
    expected = [line[name] if is_number(line[name]) else np.nan for line in rows]
    np.testing.assert_array_equal(run.columns[name].values, expected)


def test_a_damaged_line_is_named_with_its_number(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' * BLOCK + '{"step": 2, "lo\n' + '{"step": 3}\n')
  with pytest.raises(DataError, match=rf"metrics\.jsonl, line {BLOCK + 1}: expected a JSON object"):
    read_run(tmp_path)
