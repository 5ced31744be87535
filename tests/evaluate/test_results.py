"""Sums, errors and tables of results."""

import math

import numpy as np
import pytest

from deepseek_jax.evaluate.results import TextResult, format_table, mean_and_stderr


def test_metrics_follow_from_the_sums():
  result = TextResult(loss_sum=30.0, tokens=10, bytes=40, items=2)
  metrics = result.as_dict("documents")
  assert metrics["loss"] == 3.0 and metrics["perplexity"] == pytest.approx(math.exp(3))
  assert metrics["bits_per_byte"] == pytest.approx(30 / math.log(2) / 40)
  assert (metrics["tokens"], metrics["bytes"], metrics["documents"]) == (10, 40, 2)
  assert TextResult.total([result, TextResult(10.0, 5, 8, 1)]) == TextResult(40.0, 15, 48, 3)
  assert TextResult(1e6, 1, 1, 1).as_dict("documents")["perplexity"] == math.inf
  assert math.isnan(TextResult(math.nan, 1, 1, 1).as_dict("documents")["perplexity"])


def test_the_error_of_a_mean():
  values = [0.0, 1.0, 1.0, 1.0, 0.0]
  mean, stderr = mean_and_stderr(values)
  assert mean == pytest.approx(0.6) and stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
  assert mean_and_stderr([1.0]) == (1.0, None)


def test_a_table_is_aligned():
  table = format_table([{"file": "a", "acc": 0.25, "n": 1234}, {"file": "longer", "other": None, "n": 1}])
  assert table.splitlines() == ["file       acc      n  other", "a       0.2500  1,234", "longer              1"]
