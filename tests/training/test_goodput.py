"""Where the wall time of a run went, over its restarts."""

import json
import time

import pytest

from deepseek_jax.errors import DataError, WriteError
from deepseek_jax.training import goodput
from deepseek_jax.training.clock import PhaseClock
from deepseek_jax.training.goodput import CATEGORIES, GoodputWriter, account, read_goodput
from deepseek_jax.training.metrics import GOODPUT, AppendFile


@pytest.fixture
def now(monkeypatch):
  """[time], both of time.monotonic() and time.time(), which the tests move on."""
  now = [1000.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  monkeypatch.setattr(time, "time", lambda: now[0] + 1e9)
  return now


def start(folder, step=0, before=0.0):
  """(clock, writer) of a process that began `before` seconds ago."""
  clock = PhaseClock(time.monotonic() - before)
  clock.step = step
  writer = GoodputWriter(clock)
  writer.open(folder)
  return clock, writer


def train(now, clock, writer, steps, seconds=10.0, data=1.0):
  for _ in range(steps):
    with clock.measure("data"):
      now[0] += data
    with clock.measure("device"):
      now[0] += seconds
    clock.finish_step(clock.step + 1)
    writer.record(at_once=False)


def nonzero(result):
  return {name: pytest.approx(value) for name, value in result.seconds.items() if value}


def test_a_run_that_is_killed_adds_up_to_the_wall_time_over_its_restarts(now, tmp_path):
  first = now[0]
  now[0] += 5
  clock, writer = start(tmp_path, before=5)
  with clock.measure("step"):
    with clock.measure("compile"):
      now[0] += 30
    train(now, clock, writer, 3)
    with clock.measure("checkpoint"):
      writer.record()
      now[0] += 2
    train(now, clock, writer, 2)
    now[0] += 7  # killed: what it did since the last record is not known
  now[0] += 100 + 6
  clock, writer = start(tmp_path, step=3, before=6)
  with clock.measure("restore"):
    now[0] += 4
  train(now, clock, writer, 3)
  with clock.measure("eval"):
    now[0] += 20
  writer.end("finished")
  now[0] += 0.5
  writer.close()
  result = read_goodput(tmp_path)
  assert nonzero(result) == {
    "step": 60, "data": 6, "init": 11.5, "compile": 30, "restore": 4, "eval": 20, "checkpoint": 2, "lost": 22, "down": 107,
  }  # fmt: skip
  assert result.total == pytest.approx(now[0] - first) and result.starts == 2
  assert str(result).startswith("goodput 22.9% of 4 min 22 s: down 40.8%, steps 22.9%, ") and "; 2 starts" in str(
    result
  )
  assert "opening data" not in str(result)  # it took no time


def test_what_is_trained_again_is_lost_once_however_often_the_run_dies(now, tmp_path):
  for step in (0, 2, 2, 1):
    clock, writer = start(tmp_path, step)
    train(now, clock, writer, 2, seconds=20)  # a record each
  assert nonzero(read_goodput(tmp_path)) == {"step": 60, "data": 3, "lost": 105}


def test_a_finished_run_that_is_trained_on_was_not_down(now, tmp_path):
  for step, reason in ((0, "finished"), (1, "SIGTERM"), (2, "finished")):
    clock, writer = start(tmp_path, step)
    train(now, clock, writer, 1)
    writer.end(reason)
    writer.close()
    now[0] += 1000
  assert nonzero(read_goodput(tmp_path)) == {"step": 30, "data": 3, "down": 1000}


def test_a_clock_that_was_set_back_gives_no_negative_time(tmp_path, monkeypatch, now):
  clock, writer = start(tmp_path)
  train(now, clock, writer, 1)
  monkeypatch.setattr(time, "time", lambda: 5.0)
  start(tmp_path, 1)
  assert read_goodput(tmp_path).seconds["down"] == 0


def test_records_come_at_saves_and_at_most_one_in_ten_seconds_or_a_thousandth_of_the_age(now, tmp_path):
  clock, writer = start(tmp_path)

  def records():
    return (tmp_path / GOODPUT).read_text().count("\n") - 1

  train(now, clock, writer, 100, seconds=1, data=0)
  assert 9 <= records() <= 11
  before = records()
  writer.record()
  assert records() == before + 1
  clock, writer = start(tmp_path, before=100_000)
  before = records()
  train(now, clock, writer, 1000, seconds=1, data=0)
  assert 9 <= records() - before <= 11


def test_a_torn_last_line_is_cut_and_the_rest_stays(now, tmp_path):
  clock, writer = start(tmp_path)
  train(now, clock, writer, 2)
  path = tmp_path / GOODPUT
  whole = path.read_bytes()
  path.write_bytes(whole + b'{"event": "spent", "ti')
  assert read_goodput(tmp_path).seconds["step"] == 20
  start(tmp_path, 2)
  assert path.read_bytes().startswith(whole) and [json.loads(x) for x in path.read_text().splitlines()][-1]["step"] == 2


@pytest.mark.parametrize(
  "line",
  [
    "5", '{"event": "spent", "time": 3}', '{"event": "spent", "time": 3, "step": 1}', '{"event": "start", "step": 1}',
    '{"event": "spent", "time": 3, "step": 1, "seconds": [1]}', '{"event": "end", "time": "late", "step": 1}',
  ],
)  # fmt: skip
def test_a_damaged_file_is_one_error_that_names_it(tmp_path, line):
  (tmp_path / GOODPUT).write_text('{"event": "start", "time": 1, "step": 0}\n' + line + "\n")
  with pytest.raises(DataError, match=GOODPUT):
    read_goodput(tmp_path)


def test_values_that_are_no_seconds_are_left_out():
  spent = {"step": "long", "data": None, "other": 5.0, "eval": 2.0}
  records = [{"event": "spent", "time": 3.0, "step": 1, "seconds": spent}]
  assert nonzero(account([{"event": "start", "time": 1.0, "step": 0}, *records])) == {"eval": 2.0}


def test_nothing_is_written_without_a_file_and_a_full_disk_is_an_error_of_the_run(now, tmp_path, monkeypatch):
  writer = GoodputWriter(PhaseClock())
  writer.record()
  writer.end("finished")
  writer.close()
  assert not list(tmp_path.iterdir()) and read_goodput(tmp_path).total == 0
  assert set(read_goodput(tmp_path).seconds) == set(CATEGORIES)
  _, writer = start(tmp_path)

  def full(self, record):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(AppendFile, "append", full)
  with pytest.raises(WriteError, match="goodput.jsonl cannot be written: No space left"):
    writer.record()
  writer.close()  # the error that ends the run is told, not this one


def test_categories_name_every_phase():
  assert set(goodput.PHASES) - {"device"} <= set(CATEGORIES)
