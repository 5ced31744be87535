"""The forms of dispatch are one function where nothing overflows; capacity drops what V2 says and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.dispatch import DISPATCH, assign_slots, token_dropping_mask
from deepseek_jax.model_config import MoEConfig

MOE = MoEConfig(num_routed_experts=6, num_experts_per_token=2, mlp=5, num_expert_groups=3, topk_groups=2)


def problem(tokens=17, skewed=False, seed=0):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(tokens, 6)) + (np.array([9, 0, 0, 0, 0, 9]) if skewed else 0)
  indices = np.argsort(-logits, -1)[:, :2]
  weights = rng.uniform(0.1, 1, size=(tokens, 2))
  arrays = [rng.normal(size=shape) for shape in ((tokens, 4), (6, 4, 5), (6, 4, 5), (6, 5, 4))]
  x, gate, up, down = (jnp.asarray(a, jnp.float32) for a in arrays)
  return x, jnp.asarray(indices, jnp.int32), jnp.asarray(weights, jnp.float32), gate, up, down


def value_and_gradients(form, arrays, capacity=34):
  x, indices, *trained = arrays

  def loss(x, weights, gate, up, down):
    y, overflow = DISPATCH[form](x, indices, weights, gate, up, down, 34, capacity)
    return jnp.sin(y).sum(), overflow

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))(x, *trained)


@pytest.mark.parametrize("skewed", [False, True])
def test_equal_to_dense(skewed):
  arrays = problem(skewed=skewed)
  ours, reference = (value_and_gradients(form, arrays) for form in ("ragged", "dense"))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), ours, reference)


def test_assignments_that_do_not_count_need_no_capacity():
  x, indices, weights, *kernels = problem()
  half = jnp.where(jnp.arange(17)[:, None] % 2 == 0, indices, 6)  # 18 of 34
  ours, reference = (value_and_gradients(f, (x, half, weights, *kernels), 18) for f in ("ragged", "dense"))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), ours, reference)


def test_assignments_over_capacity_are_counted():
  for capacity, overflow in ((33, 1), (20, 14)):
    (_, ours), _ = value_and_gradients("ragged", problem(), capacity)
    assert int(ours) == overflow


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_capacity_drops_the_lowest_affinities_of_overfull_groups(factor):
  moe = dataclasses.replace(MOE, capacity_factor=factor)
  _, indices, weights, *_ = problem(tokens=30, skewed=False, seed=3)
  no_drop = jnp.arange(30) < 4
  ours = np.asarray(token_dropping_mask(moe, indices, weights, no_drop))
  budget = factor * indices.size / 3
  assert ours[:4].all()
  for group in range(3):
    inside = np.asarray(indices) // 2 == group
    affinity = np.where(np.asarray(no_drop)[:, None], np.inf, weights)[inside]
    stays = max(int(np.ceil(budget)), int(np.isinf(affinity).sum()))
    threshold = np.sort(affinity)[::-1][min(stays, affinity.size) - 1]
    np.testing.assert_array_equal(ours[inside], affinity >= threshold)
  assert factor > 1 or not ours.all()


def test_slots_are_sorted_by_expert_and_padded_to_blocks():
  choices = jnp.array([3, 0, 3, 2, 4, 0, 3], jnp.int32)  # 4 is no expert
  slots, sizes, num_assignments = assign_slots(choices, 4, 2)
  assert sizes.tolist() == [2, 0, 2, 4] and int(num_assignments) == 6
  assert slots.tolist()[:4] == [4, 0, 5, 2] and slots.tolist()[5:] == [1, 6] and int(slots[4]) > 100
