"""Whether 95% intervals of the exponent hold the truth as often as they say, on noisy synthetic surfaces."""

import numpy as np
import pytest

from deepseek_jax.scaling.parametric import Surface, fit_surface

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
