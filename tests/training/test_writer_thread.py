"""The thread that writes lines and events."""

import threading

import pytest

from deepseek_jax.training.writer_thread import WriterThread


class Recorder:
  """A writer that keeps what it gets, and fails at `bad_step`."""

  def __init__(self, bad_step=None):
    self.bad_step, self.got, self.threads = bad_step, [], set()

  def write(self, step, values, histograms):
    self.threads.add(threading.current_thread())
    if step == self.bad_step:
      raise OSError("no room")
    self.got.append((step, values, histograms))

  def event(self, name, step, **values):
    self.got.append((name, step, values))


def test_all_is_written_in_order_in_one_other_thread():
  writers = [Recorder(), Recorder()]
  thread = WriterThread(writers)
  for step in range(100):
    thread.write(step, lambda step=step: ({"loss": step}, {}))
  thread.event("eval", 99, loss=1.0)
  thread.drain()
  for writer in writers:
    assert writer.got == [*((step, {"loss": step}, {}) for step in range(100)), ("eval", 99, {"loss": 1.0})]
    assert len(writer.threads) == 1 and threading.current_thread() not in writer.threads
  thread.close()
  assert not next(iter(writers[0].threads)).is_alive()


def test_an_error_is_raised_once_by_what_comes_next_and_what_came_before_that_is_dropped():
  writer = Recorder(bad_step=2)
  thread = WriterThread([writer])
  with pytest.raises(OSError, match="no room"):
    for step in (1, 2, 3):
      thread.write(step, lambda: ({}, {}))
    thread.drain()
  thread.event("end", 3)
  thread.drain()
  assert writer.got == [(1, {}, {}), ("end", 3, {})]
  thread.write(2, lambda: ({}, {}))
  with pytest.raises(OSError, match="no room"):
    while True:
      thread.event("start", 0)
  thread.close()
