import numpy as np
import pytest

from deepseek_jax.training.running import BLOCK, WINDOW, running, spikes


def test_median_and_deviation_are_of_the_values_before_the_block():
  values = np.random.default_rng(0).normal(size=1000)
  usual = running(values)
  assert np.isnan(usual.median[:BLOCK]).all() and np.isfinite(usual.median[BLOCK:]).all()
  for i in (BLOCK, 3 * BLOCK + 5, 500, 999):
    end = i // BLOCK * BLOCK
    before = values[max(0, end - WINDOW) : end]
    assert usual.median[i] == np.median(before)
    assert usual.deviation[i] == pytest.approx(1.4826 * np.median(np.abs(before - np.median(before))), rel=1e-12)


def test_what_is_not_finite_does_not_count():
  values = np.random.default_rng(1).normal(size=600)
  with_gaps = values.copy()
  with_gaps[100:300] = np.nan
  kept = values[np.r_[0:100, 300:320]]
  assert running(with_gaps).median[320] == np.median(kept[-WINDOW:])
  assert np.isnan(running(np.full(50, np.nan)).median).all() and len(running(np.zeros(0)).median) == 0


def test_a_planted_spike_is_found_and_noise_is_none():
  values = 2 + 3 / (1 + np.arange(200_000) / 1000) + 0.05 * np.random.default_rng(2).standard_normal(200_000)
  assert not len(spikes(values, 8, 1.1))
  values[150_000:150_005] += [0.5, 2.0, 1.0, 0.6, 0.6]
  values[4_000] = np.nan
  assert spikes(values, 8, 1.1).tolist() == [150_001]


def test_a_falling_loss_has_no_spikes():
  assert not len(spikes(5 / np.arange(1, 2000), 8, 1.1))
  assert not len(spikes(np.full(100, 2.0), 8, 1.1)) and not len(spikes(np.zeros(3), 8, 1.1))
