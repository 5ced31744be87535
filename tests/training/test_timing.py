"""Where the time of an interval goes."""

import time

import pytest

from deepseek_jax.training.timing import IntervalTimer


def test_time_beside_steps_is_not_that_of_steps(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  timer = IntervalTimer()
  for name, seconds in (("data", 1.0), ("eval", 5.0), ("checkpoint", 2.0), ("data", 1.0)):
    with timer.measure(name):
      now[0] += seconds
  now[0] += 3.0
  timer.tokens += 50
  assert timer.throughput() == {
    "tokens_per_second": pytest.approx(50 / (3 + 2)), "step_seconds": pytest.approx(3.0),
    "data_seconds": 2.0, "eval_seconds": 5.0, "checkpoint_seconds": 2.0,
  }  # fmt: skip
  timer.reset()
  assert timer.tokens == 0 and timer.throughput()["eval_seconds"] == 0
