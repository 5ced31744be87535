"""The hash of token ids. tests/model/test_router.py has the router that it makes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.hash_router import hash_experts


# Of DeepSeek-V4 (the larger one), of `tiny`, of an odd number of experts, all of which a token has, and of one expert.
@pytest.mark.parametrize(("vocab", "experts", "per_token"), [(129_280, 384, 6), (272, 8, 2), (23, 5, 5), (7, 1, 1)])
def test_hashed_experts_of_a_token_differ_and_loads_over_a_vocabulary_are_even(vocab, experts, per_token):
  indices = np.asarray(jax.jit(hash_experts, static_argnums=(1, 2))(jnp.arange(vocab), experts, per_token))
  assert indices.shape == (vocab, per_token) and (np.diff(np.sort(indices)) > 0).all()
  load = np.bincount(indices.ravel(), minlength=experts)
  assert load.size == experts  # no index past the last expert
  assert np.ptp(load) <= (per_token if vocab % experts else 0)  # only the last block, which is not full, may be uneven
  if per_token < experts - 1:  # the tokens of a block have all different sets of experts, and so do blocks
    coprime = sum(math.gcd(step, experts) == 1 for step in range(experts))
    sets = np.unique(np.sort(indices), axis=0)
    assert len(sets) == experts * min(coprime // 2, -(-vocab // experts))


def test_the_hash_is_the_one_that_checkpoints_were_trained_with():
  """Another one gives experts other tokens than they have learned."""
  indices = jax.jit(hash_experts, static_argnums=(1, 2))(jnp.array([[0, 1, 7], [8, 16, 129_279]]), 8, 3).tolist()
  assert indices == [[[0, 3, 6], [1, 4, 7], [7, 2, 5]], [[0, 1, 2], [0, 3, 6], [7, 0, 1]]]
