"""Which windows of a source a stage of training takes: those of text that earlier stages did not consume, while there is some.

The training stream of a source is cut into equal segments, and each stage takes the next part of every segment: so each has
text from everywhere in the source. Positions are targets, and count on over epochs: beyond the length of the stream they
are repeats.
"""

from typing import NamedTuple

import numpy as np

SEGMENT_TARGETS, MAX_SEGMENTS = 1 << 20, 64  # a segment has at least so many targets; edges waste a window each


class Region(NamedTuple):
  """What a stage takes of a source: targets `start` to `end`."""

  start: int
  end: int

  def repeated(self, num_targets: int) -> int:
    """How many of its targets were consumed before, of a stream of `num_targets`."""
    return max(self.end - num_targets, 0) - max(self.start - num_targets, 0)


def take_region(start: int, windows: int, num_targets: int, seq: int) -> Region:
  """The region from `start` on of a stream of `num_targets` targets that has `windows` whole windows of `seq`.

  It is the whole stream, repeated, where that has no more windows than are asked for.
  """
  end = start + windows * seq
  while end - start < num_targets:
    missing = windows - sum(map(len, region_windows(Region(start, end), num_targets, seq)))
    if missing <= 0:
      return Region(start, end)
    end = min(end + missing * seq, start + num_targets)
  return Region(start, end)


def region_windows(region: Region, num_targets: int, seq: int) -> list[range]:
  """Ids of the windows of `seq` targets inside of `region`, each once: at most two ranges a segment, ascending."""
  if region.end - region.start >= num_targets:
    return [range(num_targets // seq)]
  if region.start == region.end:
    return []
  first, last = region.start % num_targets, region.end % num_targets
  parts = [(first, last)] if first < last else [(0, last), (first, num_targets)]
  segments = max(1, min(MAX_SEGMENTS, num_targets // SEGMENT_TARGETS))
  edges = [segment * num_targets // segments for segment in range(segments + 1)]
  windows: list[range] = []
  for low, high in zip(edges, edges[1:], strict=False):
    for part_start, part_end in parts:
      # The same fraction of every segment.
      begin, end = (low + position * (high - low) // num_targets for position in (part_start, part_end))
      windows.append(range(-(-begin // seq), end // seq))
  return [ids for ids in windows if ids]


class ConcatRanges:
  """Ranges of window ids one after another, looked up without a list of them: sample orders may have billions.

  starts, counts: int64 [ranges], the first id of each range and how many it has.
  """

  def __init__(self, starts: np.ndarray, counts: np.ndarray):
    self._starts, self._ends = starts, np.cumsum(counts)

  def __getitem__(self, index: int) -> int:
    which = int(np.searchsorted(self._ends, index, side="right"))
    return int(self._starts[which] + index - (self._ends[which - 1] if which else 0))
