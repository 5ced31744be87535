"""Whether 95% intervals of the exponent hold the truth as often as they say, on noisy synthetic surfaces; and the time."""

import time

import numpy as np
import pytest

from deepseek_jax.scaling.isoflop import fit_isoflop
from deepseek_jax.scaling.parametric import Surface, fit_surface
from tests.scaling import tables

CHINCHILLA = Surface(1.69, 406.4, 410.7, 0.34, 0.28)
SURFACES = 200


def noisy_runs(seed, sizes=10, budgets=8, noise=0.005):
  """IsoFLOP profiles of the surface, with normal noise of log loss."""
  generator = np.random.default_rng(seed)
  flops = np.repeat(np.geomspace(1e17, 3e20, budgets), sizes)
  n = 0.6 * (flops / 6) ** CHINCHILLA.a * np.tile(np.geomspace(0.2, 5, sizes), budgets)
  d = flops / (6 * n)
  return n, d, CHINCHILLA.loss(n, d) * np.exp(noise * generator.standard_normal(len(n)))


@pytest.mark.scaling
def test_the_interval_of_the_exponent_holds_the_truth_in_90_to_98_percent():
  inside = 0
  for seed in range(SURFACES):
    fit = fit_surface(*noisy_runs(seed), bootstrap=400, seed=seed)
    low, high = np.quantile(fit.samples.a, [0.025, 0.975])
    inside += low <= CHINCHILLA.a <= high
  print(f"{inside} of {SURFACES}")
  assert 0.90 <= inside / SURFACES <= 0.98


@pytest.mark.scaling
def test_so_does_that_of_approach_2(tmp_path):
  inside = 0
  for seed in range(SURFACES):
    columns = tables.isoflop_runs(np.geomspace(1e17, 1e20, 6), sizes=7, noise=0.003, seed=seed, span=3.0)
    fit = fit_isoflop(tables.made_table(tmp_path / "t.csv", columns), "M", "parabola", bootstrap=400, seed=seed)
    low, high = np.nanquantile(fit.samples[:, 0], [0.025, 0.975])
    inside += low <= tables.CHINCHILLA.a <= high
  print(f"{inside} of {SURFACES}, approach 2")
  assert 0.90 <= inside / SURFACES <= 0.98


@pytest.mark.scaling
def test_4500_starts_and_1000_samples_take_less_than_a_minute():
  n, d, losses = noisy_runs(0, sizes=25, budgets=10)
  start = time.process_time()
  fit_surface(n, d, losses)
  seconds = time.process_time() - start
  print(f"{seconds:.1f} s of CPU time for {len(n)} runs")
  assert seconds < 60
