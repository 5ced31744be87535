"""Student's t: the mean of a few runs, and the difference of two means, each with its 95% interval."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95
MAX_SEEDS = 10_000  # beyond which a number of seeds is no advice


@dataclasses.dataclass(frozen=True)
class Estimate:
  """The mean of values that differ by chance.

  Attributes:
    n: number of values.
    sd: standard deviation, with n - 1; None for one value.
    low, high: 95% interval of the mean; None for one value.
  """

  n: int
  mean: float
  sd: float | None = None
  low: float | None = None
  high: float | None = None


@dataclasses.dataclass(frozen=True)
class MeanDifference:
  """The difference of two means, A - B.

  Attributes:
    method: "paired" or "Welch".
    low, high: 95% interval.
    seeds_a, seeds_b: those that count, equal if paired.
  """

  method: str
  mean: float
  low: float
  high: float
  seeds_a: tuple[int, ...]
  seeds_b: tuple[int, ...]


def t_quantile(degrees: float) -> float:
  """Half the width of the 95% interval of Student's t with so many degrees of freedom, in standard errors."""
  return float(stdtrit(degrees, (1 + CONFIDENCE) / 2))


def estimate(values: Sequence[float]) -> Estimate:
  """The mean of `values`, at least one, and its 95% interval: mean ± t s / sqrt(n) with n - 1 degrees of freedom."""
  mean, n = float(np.mean(values)), len(values)
  if n == 1:
    return Estimate(n, mean)
  sd = float(np.std(values, ddof=1))
  half = t_quantile(n - 1) * sd / math.sqrt(n)
  return Estimate(n, mean, sd, mean - half, mean + half)


def mean_difference(a: Mapping[int, float], b: Mapping[int, float]) -> MeanDifference | None:
  """The mean of `a` minus that of `b`, {seed: value}; None where no interval is possible.

  Paired by seed where at least two seeds are in both; seeds of one alone do not count then. Otherwise Welch's interval
  for unequal variances, which needs two seeds of each. Which of the two depends on the seeds alone, not on the values.
  """
  seeds = tuple(sorted(set(a) & set(b)))
  if len(seeds) >= 2:
    paired = estimate([a[seed] - b[seed] for seed in seeds])
    assert paired.low is not None and paired.high is not None  # there are two
    return MeanDifference("paired", paired.mean, paired.low, paired.high, seeds, seeds)
  if min(len(a), len(b)) < 2:
    return None
  one, two = estimate(list(a.values())), estimate(list(b.values()))
  half = welch_half_width(one.sd or 0.0, one.n, two.sd or 0.0, two.n)
  mean = one.mean - two.mean
  return MeanDifference("Welch", mean, mean - half, mean + half, tuple(sorted(a)), tuple(sorted(b)))


def welch_half_width(sd_a: float, n_a: int, sd_b: float, n_b: int) -> float:
  """Half the width of Welch's 95% interval; degrees of freedom by Welch and Satterthwaite (Welch 1947)."""
  va, vb = sd_a**2 / n_a, sd_b**2 / n_b
  if va + vb == 0:
    return 0.0
  # Scaled by the sum, so that no square of a tiny variance becomes 0.
  fa, fb = va / (va + vb), vb / (va + vb)
  degrees = 1 / (fa**2 / (n_a - 1) + fb**2 / (n_b - 1))
  return t_quantile(degrees) * math.sqrt(va + vb)


def paired_half_width(sd: float, n: int) -> float:
  """Half the width of the paired 95% interval of `n` pairs whose differences have the standard deviation `sd`."""
  return t_quantile(n - 1) * sd / math.sqrt(n)


def seeds_needed(a: Mapping[int, float], b: Mapping[int, float], half_width: float) -> int | None:
  """The fewest seeds of each group with which the 95% interval of the difference would reach `half_width` to each side.

  The spread is taken to be the one seen: of the paired differences, or of the groups; where one group has a single seed,
  that of the other for both. None: no spread was seen, or more than MAX_SEEDS.
  """
  seeds = set(a) & set(b)
  spreads = [float(np.std(list(values.values()), ddof=1)) for values in (a, b) if len(values) > 1]
  if len(seeds) >= 2:
    sd = float(np.std([a[seed] - b[seed] for seed in seeds], ddof=1))
    width = lambda n: paired_half_width(sd, n)
  elif spreads:
    width = lambda n: welch_half_width(spreads[0], n, spreads[-1], n)
  else:
    return None
  if width(MAX_SEEDS) > half_width:
    return None
  low, high = 1, MAX_SEEDS  # width(high) is small enough, that of low is not
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if width(middle) <= half_width else (middle, high)
  return high
