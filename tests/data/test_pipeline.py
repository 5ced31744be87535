import json
import threading
import tracemalloc

import numpy as np
import pytest

from deepseek_jax.config_sections import DataConfig, TrainConfig
from deepseek_jax.data import pipeline
from deepseek_jax.data.pipeline import Consumed


@pytest.fixture
def config(tmp_path):
  """A DataConfig of two sources whose documents say "aaa..." and "bbb...", the first three times as long."""
  for letter, count in (("a", 300), ("b", 100)):
    lines = [json.dumps({"text": letter * 60 + str(i)}) for i in range(count)]
    (tmp_path / f"{letter}.jsonl").write_text("\n".join(lines))
  names = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
  return lambda **changes: DataConfig(
    **{"sources": names, "cache": str(tmp_path / "cache"), "seq": 64, "heldout_fraction": 0.2, **changes}
  )


def share_of_a(data, ids):
  tokens = data.train.tokens(ids)
  a, b = (tokens == ord("a")).sum(), (tokens == ord("b")).sum()
  return a / (a + b)


def test_windows_of_several_sources_have_one_numbering(config):
  data = pipeline.open_data(config(), 257, 0)
  ids = np.arange(len(data.train))
  one_by_one = np.concatenate([data.train.tokens(ids[i : i + 1]) for i in ids])
  shuffled = np.random.default_rng(0).permutation(ids)
  np.testing.assert_array_equal(data.train.tokens(shuffled), one_by_one[shuffled])
  np.testing.assert_array_equal(data.train.target_bytes(shuffled), data.train.target_bytes(ids)[shuffled])
  assert (one_by_one.dtype, one_by_one.shape[1]) == (np.uint32, 65)
  assert share_of_a(data, ids[:10]) == 1
  assert share_of_a(data, ids[-10:]) == 0


@pytest.mark.parametrize("ids", [[-1], [10**6], []])
def test_ids_that_are_no_window(config, ids):
  data = pipeline.open_data(config(), 257, 0)
  with pytest.raises(IndexError, match="window ids must be 0 to"):
    data.train.tokens(ids)


def test_the_order_is_a_function_of_seed_and_sample(config):
  data = pipeline.open_data(config(), 257, 7)
  whole = data.window_ids(0, 1000)
  np.testing.assert_array_equal(pipeline.open_data(config(), 257, 7).window_ids(600, 10), whole[600:610])
  assert (pipeline.open_data(config(), 257, 8).window_ids(0, 100) != whole[:100]).mean() > 0.9
  assert data.window_ids(0, 0).shape == (0,)


def test_the_order_is_the_one_that_checkpoints_were_made_with():
  # Another order would make every running experiment see other data after a resume: grain must not change it.
  order = pipeline.shuffle_and_mix([1000], [1000], seed=0)
  assert [order[i] for i in (0, 1, 2, 999, 1000, 123_456)] == [747, 666, 83, 893, 261, 607]
  order = pipeline.shuffle_and_mix([1000, 500], [0.7, 0.3], seed=2**32 - 1)
  assert [order[i] for i in (0, 1, 2, 999, 1000, 123_456)] == [189, 708, 456, 274, 890, 1058]


def test_an_epoch_has_every_window_once_and_the_next_another_order(config):
  data = pipeline.open_data(config(sources=config().sources[:1]), 257, 0)
  n = len(data.train)
  first, second = data.window_ids(0, n), data.window_ids(n, n)
  for epoch in (first, second):
    assert sorted(epoch) == list(range(n))
  assert (first != second).mean() > 0.9


@pytest.mark.parametrize(("weights", "share"), [((), 0.75), ((1.0, 1.0), 0.5), ((0.1, 0.9), 0.1)])
def test_sources_are_mixed_by_weight_or_size(config, weights, share):
  data = pipeline.open_data(config(weights=weights), 257, 0)
  for first in (0, 12_345):
    assert share_of_a(data, data.window_ids(first, 400)) == pytest.approx(share, abs=0.04)


def test_a_ramp_rises_in_steps_of_the_microbatch():
  train = TrainConfig(global_batch=64, microbatch=8, batch_ramp_from=16, batch_ramp_tokens=96_000)
  sizes = [pipeline.batch_size(train, 100 * samples) for samples in range(1200)]
  assert [sizes[i] for i in (0, 159, 160, 319, 320, 959, 960, 1199)] == [16, 16, 24, 24, 32, 56, 64, 64]
  assert pipeline.batch_size(TrainConfig(global_batch=64), 0) == 64


def test_batches_can_start_anywhere(config):
  data = pipeline.open_data(config(), 257, 0)
  train = TrainConfig(global_batch=16, microbatch=4, batch_ramp_from=4, batch_ramp_tokens=64 * 100)
  whole = list(pipeline.iterate_batches(data, train, Consumed(), 20, lambda ids: ids))
  np.testing.assert_array_equal(np.concatenate([ids for ids, _ in whole]), data.window_ids(0, whole[-1][1].samples))
  assert (len(whole[0][0]), len(whole[-1][0])) == (4, 16)
  for (ids, end), (expected, expected_end) in zip(
    pipeline.iterate_batches(data, train, whole[6][1], 13, lambda ids: ids), whole[7:], strict=True
  ):
    np.testing.assert_array_equal(ids, expected)
    assert end == expected_end


def test_batches_of_a_ramp_follow_batch_size_one_by_one(config):
  data = pipeline.open_data(config(), 257, 0)
  ramped = TrainConfig(global_batch=16, microbatch=4, batch_ramp_from=4, batch_ramp_tokens=64 * 100)
  for train in (ramped, TrainConfig(global_batch=16)):
    # 100 samples of 64 tokens are where the ramp ends.
    for samples, earlier_seq in ((0, 64), (44, 64), (99, 64), (100, 64), (1000, 64), (100, 16)):
      for steps in (1, 5, 30):
        ends = [Consumed(samples, samples * earlier_seq)]
        for _ in range(steps):
          size = pipeline.batch_size(train, ends[-1].tokens)
          ends.append(Consumed(ends[-1].samples + size, ends[-1].tokens + size * data.seq))
        assert [end for _, end in pipeline.iterate_batches(data, train, ends[0], steps, len)] == ends[1:]


def test_another_length_goes_on_with_the_sample_of_the_same_index(config):
  short, long = (pipeline.open_data(config(seq=seq), 257, 0) for seq in (32, 64))
  train, before = TrainConfig(global_batch=16), Consumed(samples=48, tokens=48 * 64)
  ((ids, after),) = pipeline.iterate_batches(short, train, before, 1, lambda ids: ids)
  np.testing.assert_array_equal(ids, short.window_ids(48, 16))
  assert after == Consumed(64, 48 * 64 + 16 * 32)
  assert short.fingerprint_at(64) == long.fingerprint != short.fingerprint == long.fingerprint_at(32)


def test_a_long_run_costs_nothing_before_its_first_batch(config):
  data = pipeline.open_data(config(), 257, 0)
  train = TrainConfig(global_batch=16, microbatch=4, batch_ramp_from=4, batch_ramp_tokens=64 * 100)
  tracemalloc.start()
  next(pipeline.iterate_batches(data, train, Consumed(), 10**12, len))
  assert tracemalloc.get_traced_memory()[1] < 1 << 20
  tracemalloc.stop()


def test_two_batches_are_read_ahead_by_another_thread(config):
  data = pipeline.open_data(config(), 257, 0)
  placed, third = [], threading.Event()

  def place(ids):
    placed.append(threading.current_thread())
    if len(placed) == 3:
      third.set()

  stream = pipeline.iterate_batches(data, TrainConfig(), Consumed(), 50, lambda ids: place(ids) or ids)
  next(stream)
  assert third.wait(10)
  assert len(placed) <= 4
  assert threading.main_thread() not in placed


def test_what_place_raises_arrives(config):
  data = pipeline.open_data(config(), 257, 0)

  def place(ids):
    raise OSError("no room on the device")

  with pytest.raises(OSError, match="no room on the device"):
    next(pipeline.iterate_batches(data, TrainConfig(), Consumed(), 5, place))
