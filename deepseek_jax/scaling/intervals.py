"""Intervals of bootstrap samples."""

import numpy as np

Interval = tuple[float, float]


def percentile_interval(samples: np.ndarray, ci: float = 0.95) -> Interval:
  """The central interval that holds the fraction `ci` of `samples` that are finite."""
  finite = samples[np.isfinite(samples)]
  if not finite.size:
    return float("nan"), float("nan")
  low, high = np.quantile(finite, [(1 - ci) / 2, (1 + ci) / 2])
  return float(low), float(high)
