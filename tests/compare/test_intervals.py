import numpy as np
import pytest
from scipy import stats

from deepseek_jax.compare.intervals import (
  estimate,
  mean_difference,
  paired_half_width,
  seeds_needed,
  welch_half_width,
)

RNG = np.random.default_rng(0)


def test_one_value_has_no_interval():
  assert estimate([2.5]).mean == 2.5 and estimate([2.5]).low is None and estimate([2.5]).sd is None


def test_the_interval_of_a_mean_is_that_of_students_t():
  values = [3.1, 3.4, 2.9, 3.3]
  got, expected = estimate(values), stats.ttest_1samp(values, 0).confidence_interval(0.95)
  np.testing.assert_allclose((got.low, got.high), expected, rtol=1e-12)
  np.testing.assert_allclose(got.sd, np.std(values, ddof=1), rtol=1e-12)


def test_differences_are_paired_by_seed_where_two_seeds_are_in_both():
  a, b = {0: 3.1, 1: 3.4, 2: 2.9, 7: 9.0}, {1: 3.2, 0: 3.0, 2: 2.85, 9: 1.0}
  got = mean_difference(a, b)
  expected = stats.ttest_rel([3.1, 3.4, 2.9], [3.0, 3.2, 2.85]).confidence_interval(0.95)
  assert got.method == "paired" and got.seeds_a == got.seeds_b == (0, 1, 2)
  np.testing.assert_allclose((got.low, got.high), expected, rtol=1e-12)


def test_differences_without_pairs_are_welchs():
  a, b = {0: 3.1, 1: 3.4, 2: 2.9}, {2: 3.0, 4: 3.3, 5: 2.2, 6: 2.4}
  got = mean_difference(a, b)
  expected = stats.ttest_ind(list(a.values()), list(b.values()), equal_var=False).confidence_interval(0.95)
  assert got.method == "Welch" and (got.seeds_a, got.seeds_b) == ((0, 1, 2), (2, 4, 5, 6))
  np.testing.assert_allclose((got.low, got.high), expected, rtol=1e-12)


@pytest.mark.parametrize(("a", "b"), [({0: 1.0}, {0: 2.0}), ({0: 1.0, 1: 2.0}, {0: 2.0}), ({}, {0: 1.0, 1: 2.0})])
def test_too_few_seeds_have_no_interval(a, b):
  assert mean_difference(a, b) is None


def test_equal_results_have_an_interval_of_no_width():
  got = mean_difference({0: 1.0, 1: 1.0}, {2: 1.5, 3: 1.5})
  assert (got.low, got.mean, got.high) == (-0.5, -0.5, -0.5)


def covers(make, truth, simulations=4000):
  """The fraction of simulated experiments whose interval holds the true difference."""
  hits = 0
  for _ in range(simulations):
    difference = mean_difference(*make())
    hits += difference.low <= truth <= difference.high
  return hits / simulations


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_the_paired_interval_covers_the_truth_95_times_in_100(seeds):
  """Seeds shift both runs alike by ten times the noise that is left. 4,000 simulations: a standard error of 0.35%."""

  def make():
    shared = RNG.normal(3.0, 0.1, seeds)
    a, b = shared + 0.02 + RNG.normal(0, 0.01, seeds), shared + RNG.normal(0, 0.01, seeds)
    return dict(enumerate(a)), dict(enumerate(b))

  assert 0.93 < covers(make, 0.02) < 0.97


def test_welchs_interval_covers_the_truth_95_times_in_100():
  """Groups of different sizes and spreads."""

  def make():
    a, b = RNG.normal(3.02, 0.01, 4), RNG.normal(3.0, 0.03, 6)
    return dict(enumerate(a)), dict(enumerate(b, start=100))

  assert 0.93 < covers(make, 0.02) < 0.97


def test_an_interval_that_ignores_pairs_would_be_found():
  """The check is sharp: the normal's 1.96 in place of Student's t covers the truth far less often."""
  hits = 0
  for _ in range(1000):
    values = RNG.normal(0.0, 1.0, 3)
    hits += abs(values.mean()) <= 1.96 * values.std(ddof=1) / np.sqrt(3)
  assert hits / 1000 < 0.9


def test_the_seeds_needed_are_the_fewest_that_reach_the_width():
  a, b = {0: 3.10, 1: 3.05, 2: 3.20}, {0: 3.00, 1: 3.04, 2: 3.02}
  sd = np.std([a[i] - b[i] for i in a], ddof=1)
  n = seeds_needed(a, b, 0.02)
  assert paired_half_width(sd, n) <= 0.02 < paired_half_width(sd, n - 1)
  apart = {seed + 10: value for seed, value in b.items()}
  n = seeds_needed(a, apart, 0.02)
  spreads = np.std(list(a.values()), ddof=1), np.std(list(b.values()), ddof=1)
  assert welch_half_width(spreads[0], n, spreads[1], n) <= 0.02 < welch_half_width(spreads[0], n - 1, spreads[1], n - 1)


def test_seeds_needed_take_the_spread_of_one_group_for_both_and_know_what_they_cannot():
  a = {0: 3.10, 1: 3.05, 2: 3.20}
  n, spread = seeds_needed(a, {0: 3.0}, 0.05), np.std(list(a.values()), ddof=1)
  assert welch_half_width(spread, n, spread, n) <= 0.05 < welch_half_width(spread, n - 1, spread, n - 1)
  assert seeds_needed({0: 3.1}, {0: 3.0}, 0.05) is None
  assert seeds_needed(a, {0: 3.0}, 1e-9) is None
  assert seeds_needed({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}, 0.1) == 2
