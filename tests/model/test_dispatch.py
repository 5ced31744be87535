"""The forms of dispatch are one function where nothing is dropped; capacity drops what V2 says and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.dispatch import DISPATCH, expert_slots, kept
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


def value_and_gradients(form, moe, arrays, exempt):
  x, indices, *trained = arrays

  def loss(x, weights, gate, up, down):
    return jnp.sin(DISPATCH[form](moe, x, indices, weights, exempt, gate, up, down)).sum()

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4)))(x, *trained)


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("form", ["ragged", "capacity"])
def test_equal_to_dense(form, skewed):
  arrays = problem(skewed=skewed)
  exempt = jnp.ones(17, bool)
  ours, reference = (value_and_gradients(f, MOE, arrays, exempt) for f in (form, "dense"))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), ours, reference)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_capacity_drops_the_lowest_affinities_of_overfull_groups(factor):
  moe = dataclasses.replace(MOE, capacity_factor=factor)
  _, indices, weights, *_ = problem(tokens=30, skewed=False, seed=3)
  exempt = jnp.arange(30) < 4
  ours = np.asarray(kept(moe, indices, weights, exempt))
  budget = factor * indices.size / 3
  assert ours[:4].all()
  for group in range(3):
    inside = np.asarray(indices) // 2 == group
    affinity = np.where(np.asarray(exempt)[:, None], np.inf, weights)[inside]
    stays = max(int(np.ceil(budget)), int(np.isinf(affinity).sum()))
    threshold = np.sort(affinity)[::-1][min(stays, affinity.size) - 1]
    np.testing.assert_array_equal(ours[inside], affinity >= threshold)
  assert factor > 1 or not ours.all()


def test_a_dropped_choice_adds_nothing():
  arrays = problem(tokens=30)
  moe, exempt = dataclasses.replace(MOE, capacity_factor=0.5), jnp.zeros(30, bool)
  stays = kept(moe, arrays[1], arrays[2], exempt)
  ours = DISPATCH["capacity"](moe, *arrays[:3], exempt, *arrays[3:])
  weights = jnp.where(stays, arrays[2], 0)
  expected = DISPATCH["dense"](moe, arrays[0], arrays[1], weights, exempt, *arrays[3:])
  np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-5)
  assert not stays.all()


def test_slots_are_sorted_by_expert_and_padded_to_blocks():
  choices = jnp.array([3, 0, 3, 2, 4, 0, 3], jnp.int32)  # 4 is no expert
  slots, sizes = expert_slots(choices, 4, 2)
  assert sizes.tolist() == [2, 0, 2, 4]
  assert slots.tolist()[:4] == [4, 0, 5, 2] and slots.tolist()[5:] == [1, 6] and int(slots[4]) > 100
