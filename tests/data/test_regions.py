"""What stages take of a stream: disjoint windows from everywhere in it, and repeats only where there is no more."""

import itertools

import numpy as np
import pytest

from deepseek_jax.data import regions
from deepseek_jax.data.regions import ConcatRanges, Region, region_windows, take_region


@pytest.fixture(params=[1, 4])
def segments(request, monkeypatch):
  """Number of segments of a stream of 10,000 targets."""
  monkeypatch.setattr(regions, "SEGMENT_TARGETS", 10_000 // request.param)
  return request.param


def targets(region, num_targets, seq):
  return [w * seq + i for ids in region_windows(region, num_targets, seq) for w in ids for i in range(seq)]


def concat(ranges):
  return ConcatRanges(np.array([ids.start for ids in ranges]), np.array([len(ids) for ids in ranges]))


def test_regions_are_disjoint_across_lengths_until_the_stream_is_consumed(segments):
  taken, seen = 0, []
  for windows, seq in ((300, 8), (20, 64), (5, 256), (200, 16)):
    region = take_region(taken, windows, 10_000, seq)
    ours = targets(region, 10_000, seq)
    assert len(ours) // seq >= windows and region.repeated(10_000) == 0
    assert region.end - region.start <= (windows + 3 * segments) * seq  # what the edges waste
    seen += ours
    taken = region.end
  assert len(set(seen)) == len(seen) <= 10_000
  last = take_region(taken, 100, 10_000, 64)  # more than is left: it goes on at the start
  assert last.repeated(10_000) == last.end - 10_000 > 0
  assert set(targets(last, 10_000, 64)) & set(seen)


def test_each_region_has_text_from_every_segment(segments):
  for start in (0, 2_000, 9_500):
    of_segments = {t * segments // 10_000 for t in targets(take_region(start, 40, 10_000, 16), 10_000, 16)}
    assert of_segments == set(range(segments)), start


def test_a_region_of_more_than_the_stream_is_all_of_it(segments):
  region = take_region(123, 2_000, 10_000, 16)
  assert region_windows(region, 10_000, 16) == [range(625)]
  assert region.end - region.start >= 10_000
  # 123 targets are new: the others were consumed before, or are by an earlier epoch.
  assert region.repeated(10_000) == region.end - 10_000


def test_an_empty_region_takes_nothing(segments):
  assert region_windows(Region(40, 40), 10_000, 16) == []


def test_ranges_are_looked_up_like_their_list():
  ranges = [range(3, 5), range(10, 11), range(0, 3)]
  lookup = concat(ranges)
  assert [lookup[i] for i in range(6)] == list(itertools.chain(*ranges))


def test_regions_of_a_long_stream_take_no_list_of_its_windows():
  region = take_region(10**12, 10**8, 14 * 10**12, 4096)
  ranges = region_windows(region, 14 * 10**12, 4096)
  assert len(ranges) <= 2 * regions.MAX_SEGMENTS and sum(map(len, ranges)) >= 10**8
  assert isinstance(concat(ranges)[10**8 - 1], int) and np.iinfo(np.int64).max > ranges[-1].stop
