"""Each sampling rule against its definition, on rows with rules of their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.generate.request import BOUNDS, Sampling
from deepseek_jax.generate.sampling import RULES, log_probabilities, sample_tokens, stack_rules, top_k, top_p

LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.07, 0.03]]))
PLAIN = Sampling(max_tokens=1)


def sample(logits, *settings, counts=None, in_prompt=None, position=0):
  """A token for each row of `logits`, by the rules of its own."""
  counts = np.zeros(logits.shape, np.int32) if counts is None else np.array(counts, np.int32)
  in_prompt = np.zeros(logits.shape, bool) if in_prompt is None else np.array(in_prompt)
  positions = np.full(len(logits), position, np.int32)
  return jitted(jnp.asarray(logits), stack_rules(settings), counts, in_prompt, positions).tolist()


jitted = jax.jit(sample_tokens)


def draw(settings, count=4000):
  """Share of each token among `count` draws, each with a seed of its own."""
  rows = [dataclasses.replace(settings, seed=seed) for seed in range(count)]
  return np.bincount(sample(jnp.repeat(LOGITS, count, 0), *rows), minlength=5) / count


def test_plain_sampling_follows_the_probabilities():
  np.testing.assert_allclose(draw(PLAIN), np.exp(LOGITS[0]), atol=0.03)


@pytest.mark.parametrize("end", [0, 1])
def test_the_bounds_of_every_rule_fit_its_dtype(end):
  bounds = {name: BOUNDS[name][end] for name in RULES}
  rules = stack_rules([Sampling(max_tokens=1, **bounds)])
  assert {name: getattr(rules, name)[0] for name in RULES} == {n: RULES[n](value) for n, value in bounds.items()}


def test_temperature():
  expected = np.exp(LOGITS[0] / 0.5) / np.exp(LOGITS[0] / 0.5).sum()
  np.testing.assert_allclose(draw(dataclasses.replace(PLAIN, temperature=0.5)), expected, atol=0.03)
  assert draw(dataclasses.replace(PLAIN, temperature=0.0)).tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize(("k", "kept"), [(1, 1), (3, 3), (0, 5), (9, 5)])
def test_top_k(k, kept):
  assert int(jnp.isfinite(top_k(LOGITS, jnp.array([k]))).sum()) == kept
  assert int(jnp.argmax(top_k(LOGITS, jnp.array([k])))) == 0


@pytest.mark.parametrize(("p", "kept"), [(0.4, 1), (0.5, 1), (0.51, 2), (0.8, 3), (0.95, 4), (1.0, 5), (0.0, 1)])
def test_top_p_keeps_the_fewest_that_hold_p(p, kept):
  shuffled = LOGITS[:, jnp.array([3, 0, 4, 1, 2])]
  assert int(jnp.isfinite(top_p(shuffled, jnp.array([p]))).sum()) == kept


@pytest.mark.parametrize(("p", "kept"), [(0.0, 5), (0.05, 5), (0.07, 4), (0.2, 3), (0.31, 2), (0.51, 1), (1.0, 1)])
def test_min_p_keeps_what_is_not_much_rarer_than_the_likeliest(p, kept):
  shares = draw(dataclasses.replace(PLAIN, min_p=p))
  assert np.count_nonzero(shares) == kept
  expected = np.exp(LOGITS[0][:kept])
  np.testing.assert_allclose(shares[:kept], expected / expected.sum(), atol=0.03)


def test_rows_have_rules_of_their_own():
  rows = [
    PLAIN,
    dataclasses.replace(PLAIN, temperature=0.0),
    dataclasses.replace(PLAIN, top_k=2),
    dataclasses.replace(PLAIN, top_p=0.6),
  ]
  rows += [dataclasses.replace(PLAIN, repetition_penalty=3.0), dataclasses.replace(PLAIN, min_p=0.9)]
  rows = [dataclasses.replace(row, seed=seed) for seed in range(300) for row in rows]
  logits, counts = jnp.repeat(LOGITS, len(rows), 0), np.zeros((len(rows), 5), np.int32)
  counts[:, 0] = 1
  together = sample(logits, *rows, counts=counts)
  alone = [sample(LOGITS, row, counts=counts[:1])[0] for row in rows[:60]]
  assert together[:60] == alone
  kinds = [set(together[i::6]) for i in range(6)]
  assert [len(kind) for kind in kinds] == [5, 1, 2, 2, 5, 1]


@pytest.mark.parametrize("rules", [
  dict(temperature=2e-38), dict(temperature=1e-44), dict(temperature=1e-300), dict(top_p=1e-30), dict(top_p=1e-300),
  dict(temperature=2e-38, top_k=3, top_p=0.9), dict(top_p=0.0), dict(min_p=1.0),
])  # fmt: skip
def test_at_the_limits_the_likeliest_token_is_sampled(rules):
  settings = dataclasses.replace(PLAIN, **rules)
  logits = jnp.array([[-jnp.inf, 20.0, 40.0, 39.0, -jnp.inf], [-90.0, -80.0, -jnp.inf, -81.0, -700.0]])
  tokens = [sample(logits, *[dataclasses.replace(settings, seed=i)] * 2) for i in range(2)]
  assert tokens == [[2, 1]] * 2


def test_equal_logits_at_a_tiny_temperature_stay_a_choice():
  settings = dataclasses.replace(PLAIN, temperature=2e-38)
  tokens = sample(jnp.array([[1.0, 3.0, 3.0]] * 20), *[dataclasses.replace(settings, seed=i) for i in range(20)])
  assert set(tokens) == {1, 2}


@pytest.mark.parametrize("penalty", [1e-38, 1e38])
def test_an_extreme_repetition_penalty_leaves_a_token_to_sample_and_forbidden_ids_forbidden(penalty):
  settings = dataclasses.replace(PLAIN, repetition_penalty=penalty)
  token = sample(jnp.array([[-jnp.inf, 3.0, 2.0]]), settings, in_prompt=[[True, False, True]])
  assert token == [1 if penalty > 1 else 2]


@pytest.mark.parametrize(
  ("p", "kept"), [(0.2, [0]), (0.3, [0, 2]), (0.5, [0, 2]), (0.6, [0, 2, 3]), (0.99, [0, 2, 3, 4])]
)
def test_of_equally_likely_tokens_top_p_keeps_the_fewest(p, kept):
  logits = jnp.array([[1.0, -jnp.inf, 1.0, 1.0, 1.0], [1.0, -jnp.inf, 1.0, 1.0, 1.0]])
  for row in np.asarray(jnp.isfinite(top_p(logits, jnp.array([p, p])))):
    assert np.flatnonzero(row).tolist() == kept


def test_of_equal_logits_top_k_keeps_k():
  logits = jnp.array([[1.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
  kept = np.asarray(jnp.isfinite(top_k(logits, jnp.array([2, 2]))))
  assert [np.flatnonzero(row).tolist() for row in kept] == [[0, 1], [0, 1]]


def test_repetition_penalty_makes_tokens_of_prompt_and_answer_rarer_whatever_their_sign():
  settings = dataclasses.replace(PLAIN, temperature=0.0, repetition_penalty=2.0)
  for where in ({"in_prompt": [[True, True, False]]}, {"counts": [[1, 3, 0]]}):
    assert sample(jnp.array([[3.0, 1.0, 2.0]]), settings, **where) == [2]
    assert sample(jnp.array([[-1.0, -3.0, -1.5]]), settings, **where) == [2]


def test_presence_and_frequency_count_in_the_answer_alone():
  greedy = dataclasses.replace(PLAIN, temperature=0.0)
  logits = jnp.array([[3.0, 2.0, 1.75]])
  presence, frequency = (
    dataclasses.replace(greedy, presence_penalty=1.1),
    dataclasses.replace(greedy, frequency_penalty=0.5),
  )
  assert sample(logits, presence, in_prompt=[[True] * 3]) == sample(logits, frequency, in_prompt=[[True] * 3]) == [0]
  assert sample(logits, presence, counts=[[5, 0, 0]]) == [1] and sample(logits, presence, counts=[[1, 1, 0]]) == [0]
  assert sample(logits, frequency, counts=[[1, 0, 0]]) == [0] and sample(logits, frequency, counts=[[3, 1, 0]]) == [2]
  assert sample(logits, dataclasses.replace(greedy, presence_penalty=-1.5), counts=[[0, 0, 1]]) == [2]


def test_forbidden_ids_never_come():
  logits = jnp.repeat(LOGITS.at[0, 0].set(-jnp.inf), 50, 0)
  rows = [dataclasses.replace(PLAIN, seed=i, presence_penalty=2.0) for i in range(50)]
  tokens = sample(logits, *rows, counts=np.ones((50, 5)))
  assert 0 not in tokens and len(set(tokens)) > 1


def test_seed_and_position_decide():
  logits = jnp.zeros((3, 50))
  rows = [dataclasses.replace(PLAIN, seed=s) for s in (1, 1, 2)]
  first, second, third = sample(logits, *rows)
  assert first == second != third and sample(logits, *rows, position=1)[0] != first


def test_log_probabilities_are_of_the_model_and_in_order():
  chosen, ids, values = log_probabilities(LOGITS, jnp.array([3]))
  np.testing.assert_allclose(chosen, [np.log(0.07)], rtol=1e-6)
  assert ids.tolist() == [[0, 1, 2, 3, 4]]
  np.testing.assert_allclose(values, LOGITS, rtol=1e-6)
