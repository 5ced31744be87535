"""The clock is in one phase at a time, and its seconds add up."""

import time

import pytest

from deepseek_jax.training import clock as clock_module
from deepseek_jax.training.clock import PHASES, PhaseClock, process_start


@pytest.fixture
def now(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  return now


def test_phases_nest_and_their_seconds_add_up_to_the_time_since_the_start(now):
  clock = PhaseClock(started=97.0)
  spans = []
  clock.listener = lambda *span: spans.append(span)
  with clock.measure("step"):
    now[0] += 1
    with clock.measure("eval"):
      now[0] += 2
      assert clock.current == ("eval", 101)
    now[0] += 4
    with pytest.raises(KeyError), clock.measure("checkpoint"):
      now[0] += 8
      raise KeyError
    now[0] += 16
  now[0] += 32
  assert clock.current[0] == "init"
  assert {k: v for k, v in clock.seconds().items() if v} == {"init": 35, "step": 21, "eval": 2, "checkpoint": 8}
  assert sum(clock.seconds().values()) == now[0] - 97 and set(clock.seconds()) == set(PHASES)
  assert [name for name, *_ in spans] == ["init", "step", "eval", "step", "checkpoint", "step"]
  assert all(before[2] == after[1] for before, after in zip(spans, spans[1:], strict=False))


def test_a_step_is_what_the_loop_waits_computes_and_dispatches_for_it_and_nothing_else(now):
  clock = PhaseClock()
  now[0] += 50
  with clock.measure("step"):
    with clock.measure("compile"):
      now[0] += 100
    for step, seconds in ((1, 3.0), (2, 5.0)):
      for phase, part in (("data", 1), ("device", seconds), ("eval", 1000)):
        with clock.measure(phase):
          now[0] += part
      now[0] += 0.5
      clock.finish_step(step)
    assert clock.step == 2 and list(clock.step_seconds) == [4.5, 6.5]
    with clock.measure("compile"):  # the next stage's program
      now[0] += 100
    assert not clock.step_seconds
    now[0] += 7
    clock.finish_step(3)
    assert list(clock.step_seconds) == [7]


def test_a_tick_is_a_sign_of_progress_and_no_phase(now):
  clock = PhaseClock()
  with clock.measure("eval"):
    now[0] += 5
    clock.tick()
    assert clock.current == ("eval", 105) and clock.seconds()["eval"] == 5


def test_a_process_started_a_moment_ago_or_now_where_the_system_does_not_tell(monkeypatch):
  before = time.monotonic()
  assert before - 3600 * 24 < process_start() < before
  monkeypatch.setattr(clock_module.time, "CLOCK_BOOTTIME", None, raising=False)
  monkeypatch.setattr("builtins.open", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError()))
  assert process_start() >= before
