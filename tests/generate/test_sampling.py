"""Each sampling rule against its definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config_sections import SampleConfig
from deepseek_jax.generate.sampling import next_token, top_k, top_p

LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.07, 0.03]]))
PLAIN = SampleConfig(temperature=1.0, top_k=0, top_p=1.0)


def draw(config, count=4000, token_in_text=None):
  """Share of each token among `count` draws."""
  token_in_text = jnp.zeros(LOGITS.shape, bool) if token_in_text is None else token_in_text
  tokens = jax.vmap(lambda key: next_token(LOGITS, token_in_text, key, config))(
    jax.random.split(jax.random.key(0), count)
  )
  return np.bincount(np.asarray(tokens).ravel(), minlength=5) / count


def test_plain_sampling_follows_the_probabilities():
  np.testing.assert_allclose(draw(PLAIN), np.exp(LOGITS[0]), atol=0.03)


def test_temperature():
  expected = np.exp(LOGITS[0] / 0.5) / np.exp(LOGITS[0] / 0.5).sum()
  np.testing.assert_allclose(draw(dataclasses.replace(PLAIN, temperature=0.5)), expected, atol=0.03)
  assert draw(dataclasses.replace(PLAIN, temperature=0.0)).tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize(("k", "kept"), [(1, 1), (3, 3), (0, 5), (9, 5)])
def test_top_k(k, kept):
  assert int(jnp.isfinite(top_k(LOGITS, k)).sum()) == kept
  assert int(jnp.argmax(top_k(LOGITS, k))) == 0


@pytest.mark.parametrize(("p", "kept"), [(0.4, 1), (0.5, 1), (0.51, 2), (0.8, 3), (0.95, 4), (1.0, 5)])
def test_top_p_keeps_the_fewest_that_hold_p(p, kept):
  shuffled = LOGITS[:, jnp.array([3, 0, 4, 1, 2])]
  assert int(jnp.isfinite(top_p(shuffled, p)).sum()) == kept


@pytest.mark.parametrize("config", [
  dict(temperature=2e-38), dict(temperature=1e-44), dict(temperature=1e-300), dict(temperature=1.0, top_p=1e-30),
  dict(temperature=1.0, top_p=1e-300), dict(temperature=2e-38, top_k=3, top_p=0.9),
])  # fmt: skip
def test_at_the_limits_the_likeliest_token_is_sampled(config):
  config = dataclasses.replace(PLAIN, **config)
  logits = jnp.array([[-jnp.inf, 20.0, 40.0, 39.0, -jnp.inf], [-90.0, -80.0, -jnp.inf, -81.0, -700.0]])
  tokens = [next_token(logits, jnp.zeros((2, 5), bool), jax.random.key(i), config).tolist() for i in range(2)]
  assert tokens == [[2, 1]] * 2


def test_equal_logits_at_a_tiny_temperature_stay_a_choice():
  logits, config = jnp.array([[1.0, 3.0, 3.0]]), dataclasses.replace(PLAIN, temperature=2e-38)
  tokens = {int(next_token(logits, jnp.zeros((1, 3), bool), jax.random.key(i), config)[0]) for i in range(20)}
  assert tokens == {1, 2}


@pytest.mark.parametrize("penalty", [1e-38, 1e-300, 1e38])
def test_an_extreme_repetition_penalty_leaves_a_token_to_sample_and_forbidden_ids_forbidden(penalty):
  config = dataclasses.replace(PLAIN, repetition_penalty=penalty)
  logits = jnp.array([[-jnp.inf, 3.0, 2.0]])
  token = next_token(logits, jnp.array([[True, False, True]]), jax.random.key(0), config)
  assert token.tolist() == [1 if penalty > 1 else 2]


@pytest.mark.parametrize(
  ("p", "kept"), [(0.2, [0]), (0.3, [0, 2]), (0.5, [0, 2]), (0.6, [0, 2, 3]), (0.99, [0, 2, 3, 4])]
)
def test_of_equally_likely_tokens_top_p_keeps_the_fewest(p, kept):
  logits = jnp.array([[1.0, -jnp.inf, 1.0, 1.0, 1.0], [1.0, -jnp.inf, 1.0, 1.0, 1.0]])
  for row in np.asarray(jnp.isfinite(top_p(logits, p))):
    assert np.flatnonzero(row).tolist() == kept


def test_of_equal_logits_top_k_keeps_k():
  logits = jnp.array([[1.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
  kept = np.asarray(jnp.isfinite(top_k(logits, 2)))
  assert [np.flatnonzero(row).tolist() for row in kept] == [[0, 1], [0, 1]]


def test_repetition_penalty_makes_seen_tokens_rarer_whatever_their_sign():
  config = SampleConfig(temperature=0.0, repetition_penalty=2.0)
  token_in_text = jnp.array([[True, True, False]])
  assert next_token(jnp.array([[3.0, 1.0, 2.0]]), token_in_text, jax.random.key(0), config).tolist() == [2]
  assert next_token(jnp.array([[-1.0, -3.0, -1.5]]), token_in_text, jax.random.key(0), config).tolist() == [2]


def test_forbidden_ids_never_come():
  logits = LOGITS.at[0, 0].set(-jnp.inf)
  tokens = [int(next_token(logits, jnp.ones((1, 5), bool), jax.random.key(i), PLAIN)[0]) for i in range(50)]
  assert 0 not in tokens and len(set(tokens)) > 1
