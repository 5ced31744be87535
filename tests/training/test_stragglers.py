"""The process that holds the others up is named, and none where they are even."""

import collections
import time

import pytest

from deepseek_jax.training import stragglers
from deepseek_jax.training.clock import PhaseClock
from deepseek_jax.training.stragglers import HostTimes, Stragglers


class Lines:
  """A console."""

  def __init__(self):
    self.lines = []

  def print(self, text, err=False):
    self.lines.append(text)


@pytest.fixture
def run(monkeypatch):
  """A function: host seconds of each process in each interval -> (metrics of each line, lines on the console)."""

  def run(intervals, step_seconds=1.0):
    now, board = [100.0], collections.defaultdict(dict)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stragglers, "process_count", lambda: len(intervals[0]))
    monkeypatch.setattr(stragglers, "shared", lambda name: dict(board[name]))
    clock, console = PhaseClock(), Lines()
    slowest = Stragglers(clock, console)
    slowest._sender.submit = lambda function, *arguments: sent.append(arguments)
    lines = []
    for interval in intervals:
      sent = []
      for _ in range(4):  # steps of process 0
        with clock.measure("data"):
          now[0] += interval[0] * 0.75
        with clock.measure("step"):
          now[0] += interval[0] * 0.25
        with clock.measure("device"):
          now[0] += step_seconds - interval[0]
        with clock.measure("eval"):
          now[0] += 50
        clock.finish_step(clock.step + 1)
      before = slowest.share()
      ((slot, (step, mine)),) = sent
      assert step == clock.step and mine == pytest.approx(interval[0])
      board[slot] |= {process: (step, seconds) for process, seconds in enumerate(interval) if seconds is not None}
      if before:  # when all have shared this line's
        lines.append(slowest.metrics(*before))
    slowest.close()
    return lines, console.lines

  return run


def test_a_process_that_is_slow_in_several_lines_in_a_row_is_named_once(run):
  even, slow = (0.01, 0.02, 0.02, 0.01), (0.01, 0.02, 0.7, 0.01)
  lines, said = run([even, slow, slow, even, slow, slow, slow, slow, even])
  assert [line.get("straggler") for line in lines] == [None] * 6 + [2, 2]
  assert [line["slowest_process"] for line in lines][4:] == [2] * 4
  assert lines[1] == {"host_seconds_max": 0.7, "host_seconds_median": pytest.approx(0.015), "slowest_process": 2}
  assert len(said) == 1
  assert said[0].startswith(
    "step 28: process 2 holds the others up: 0.7 s of its own in a step of 1 s, the others 0.01 s"
  )


def test_one_of_two_processes_is_compared_with_the_other(run):
  assert run([(0.1, 0.6)] * 5)[0][-1]["straggler"] == 1 and "process 1" in run([(0.1, 0.6)] * 5)[1][0]
  assert "straggler" not in run([(0.5, 0.6)] * 5)[0][-1]


def test_another_process_each_time_is_noise(run):
  turns = [tuple(0.8 if process == i % 3 else 0.1 for process in range(3)) for i in range(9)]
  lines, said = run(turns)
  assert not any("straggler" in line for line in lines) and not said


def test_what_is_small_beside_the_step_holds_nobody_up(run):
  for times, step_seconds in (((0.09, 0.01, 0.01), 1.0), ((0.03, 0.001, 0.001), 0.1)):
    lines, said = run([times] * 6, step_seconds)
    assert [line["slowest_process"] for line in lines] == [0] * 5
    assert not any("straggler" in line for line in lines) and not said


def test_a_line_without_the_times_of_all_processes_has_none(run):
  assert run([(0.1, None, 0.1)] * 3) == ([{}, {}], [])


def test_a_process_alone_shares_nothing():
  clock = PhaseClock()
  slowest = Stragglers(clock, Lines())
  clock.finish_step(1)
  assert slowest.share() is None and not slowest._sender._threads


def test_the_median_is_of_the_other_processes():
  times = HostTimes({0: 0.1, 1: 0.2, 2: 0.9}, 1.0)
  assert (times.slowest, times.others_median, times.is_uneven) == (2, pytest.approx(0.15), True)
  assert not HostTimes({0: 0.6, 1: 0.6, 2: 0.8}, 1.0).is_uneven
