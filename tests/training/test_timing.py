"""Where the time of an interval goes."""

import time

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.training.clock import PhaseClock
from deepseek_jax.training.timing import IntervalTimer, MetricsReader


@pytest.fixture
def now(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  return now


@pytest.fixture
def spend(now):
  """(a function that is in a phase for some seconds, a timer of that)."""
  clock = PhaseClock()

  def spend(name, seconds):
    with clock.measure(name):
      now[0] += seconds

  return spend, IntervalTimer(clock)


def test_time_beside_steps_is_not_that_of_steps(now, spend):
  spend, timer = spend
  for name, seconds in (("data", 1.0), ("eval", 5.0), ("checkpoint", 2.0), ("data", 1.0)):
    spend(name, seconds)
  now[0] += 3.0
  timer.tokens += 50
  assert timer.throughput(now[0]) == {
    "tokens_per_second": pytest.approx(50 / (3 + 2)), "step_seconds": pytest.approx(3.0),
    "data_seconds": 2.0, "eval_seconds": 5.0, "checkpoint_seconds": 2.0,
  }  # fmt: skip
  timer.start_interval(now[0])
  assert timer.tokens == 0 and timer.throughput(now[0] + 1)["eval_seconds"] == 0


def test_intervals_add_up_to_the_wall_time_although_steps_arrive_while_the_loop_does_other_things(now, spend):
  """A loop that waits 4 s for data, while the step before takes 1 s; lines are read up to a second late."""
  spend, timer = spend
  intervals = []
  for arrived in (105.0, 109.0, 113.0):
    timer.tokens += 8
    while now[0] < arrived:
      spend("data", 4.0)
    now[0] += 0.5
    intervals.append(timer.throughput(arrived))
    timer.start_interval(arrived)
  seconds = [sum(value for name, value in each.items() if name.endswith("_seconds")) for each in intervals]
  assert seconds == pytest.approx([5, 4, 4]) and [each["data_seconds"] for each in intervals] == pytest.approx(
    [5, 3.5, 3.5]
  )
  assert [each["tokens_per_second"] for each in intervals] == pytest.approx([8 / 5, 2, 2])


def test_metrics_arrive_when_the_device_is_done_and_not_when_the_loop_asks():
  reader, loss = MetricsReader(), jax.block_until_ready(jnp.float32(2))
  before = time.monotonic()
  metrics = reader.read({"loss": loss})
  time.sleep(0.5)
  values, arrived = metrics.result()
  assert values == {"loss": 2.0} and not isinstance(values["loss"], jax.Array) and before < arrived < before + 0.4
  reader.close()
