"""Running medians of a noisy metric, and what rises far above them."""

import dataclasses

import numpy as np

WINDOW, BLOCK = 64, 16  # values before a block of values, which its median is of


@dataclasses.dataclass(frozen=True)
class Running:
  """What is usual at each value: of the up to WINDOW finite values before its block, float64 [n]; NaN in the first block.

  deviation: 1.4826 times the median of the absolute deviations from the median: the standard deviation of normal noise.
  """

  median: np.ndarray
  deviation: np.ndarray


def running(values: np.ndarray) -> Running:
  """The Running of `values` float64 [n], in which NaN is what was not finite."""
  n, finite = len(values), np.flatnonzero(~np.isnan(values))
  blocks = -(-n // BLOCK)
  median, deviation = np.full(blocks, np.nan), np.full(blocks, np.nan)
  if len(finite) < BLOCK:
    return Running(np.full(n, np.nan), np.full(n, np.nan))
  usable = values[finite]
  counts = np.searchsorted(finite, np.arange(blocks) * BLOCK)  # of finite values before each block
  for block in np.flatnonzero((counts >= BLOCK) & (counts < WINDOW)).tolist():
    before = usable[: counts[block]]
    median[block] = np.median(before)
    deviation[block] = np.median(np.abs(before - median[block]))
  full = np.flatnonzero(counts >= WINDOW)
  if len(full):
    windows = np.lib.stride_tricks.sliding_window_view(usable, WINDOW)[counts[full] - WINDOW]
    median[full] = np.median(windows, 1)
    deviation[full] = np.median(np.abs(windows - median[full, None]), 1)
  return Running(np.repeat(median, BLOCK)[:n], 1.4826 * np.repeat(deviation, BLOCK)[:n])


def spikes(values: np.ndarray, sigmas: float, factor: float) -> np.ndarray:
  """Indices of `values` float64 [n] that lie above `factor` times the running median, and by more than `sigmas` deviations.

  Of neighbors within BLOCK values only the largest is named.
  """
  usual = running(values)
  with np.errstate(invalid="ignore"):
    excess = values - np.maximum(usual.median + sigmas * usual.deviation, factor * usual.median)
  above = np.flatnonzero(excess > 0)
  if not len(above):
    return above
  groups = np.split(above, np.flatnonzero(np.diff(above) > BLOCK) + 1)
  return np.array([group[np.argmax(values[group])] for group in groups])
