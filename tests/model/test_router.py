"""The router against the papers' rules, written one token at a time in NumPy."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config_sections import MeshConfig
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.router import ROUTERS, SCORES, Router, hash_experts
from deepseek_jax.model_config import ModelConfig
from tests.configs import HASH_MOE, MOE

V3 = dataclasses.replace(MOE, num_routed_experts=12)
V2 = dataclasses.replace(
  V3, score="softmax", group_score="max", router_bias=False, norm_topk_prob=False, route_scale=16.0
)
GREEDY = dataclasses.replace(V2, num_expert_groups=1, topk_groups=1, route_scale=1.0)
HASH = dataclasses.replace(HASH_MOE, num_routed_experts=12)
NEGATIVE = "v3 with biases that make every choice negative"
CASES = {
  "v3": V3, NEGATIVE: V3, "v2": V2, "greedy": GREEDY,
  "hash": HASH, "hash without norm": dataclasses.replace(HASH, norm_topk_prob=False, score="softmax"),
}  # fmt: skip

# Of the logits [experts] of one token, by model.moe.score.
SCORE_FORMULAS = {
  "softmax": lambda logits: np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum(),
  "sigmoid": lambda logits: 1 / (1 + np.exp(-logits)),
}


# Of random tokens [batch, seq], among them the ends of blocks of 12 ids.
TOKENS = np.random.default_rng(2).integers(0, 129_280, (2, 20))
TOKENS[0, :7] = 0, 1, 11, 12, 23, 24, 129_279


def route(moe, shift=0.0):
  """(Routing, x, kernel, bias) of random tokens."""
  config = ModelConfig(embed=16, moe=moe, init_std=0.5, compute_dtype="float32")
  with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
    router = ROUTERS[moe.router](config, nnx.Rngs(0))
    bias = np.zeros(12, np.float32)
    if moe.router_bias:
      bias = np.random.default_rng(1).normal(size=12).astype(np.float32) * 0.2 + np.float32(shift)
      router.bias = type(router.bias)(jnp.asarray(bias))
    x = np.random.default_rng(0).normal(size=(2, 20, 16)).astype(np.float32)
    routing = router(jnp.asarray(x), SimpleNamespace(token_ids=jnp.asarray(TOKENS)))
    return jax.device_get(routing), x, np.asarray(router.kernel[...]), bias


def choose_topk(moe, scores, bias, token):
  """The experts of one token by its `scores` [experts]."""
  groups = (scores + bias).reshape(moe.num_expert_groups, -1)
  best = [sorted(g)[-1] if moe.group_score == "max" else sum(sorted(g)[-2:]) for g in groups]
  allowed = np.argsort(best)[-moe.topk_groups :]
  size = groups.shape[1]
  candidates = [e for e in range(12) if e // size in allowed]
  return sorted(candidates, key=lambda e: -(scores + bias)[e])[: moe.num_experts_per_token]


def choose_hash(moe, scores, bias, token):
  """The experts of one token by its id."""
  experts = moe.num_routed_experts
  steps = [step for step in range(1, experts // 2 + 1) if math.gcd(step, experts) == 1]
  steps.sort(key=lambda step: abs(step / experts - 0.381966))
  step = steps[token // experts % len(steps)]
  return [(token + slot * step) % experts for slot in range(moe.num_experts_per_token)]


# Of (config, scores [experts], bias [experts], id) of one token, by model.moe.router.
RULES = {"topk": choose_topk, "hash": choose_hash}


def expected(moe, x, kernel, bias, token):
  """(indices, weights) of one token."""
  scores = SCORE_FORMULAS[moe.score](x.astype(np.float64) @ kernel)
  chosen = RULES[moe.router](moe, scores, bias, token)
  weights = scores[chosen] / (scores[chosen].sum() if moe.norm_topk_prob else 1) * moe.route_scale
  return chosen, weights


def test_every_router_and_score_has_a_formula_and_a_case():
  assert set(SCORES) == set(SCORE_FORMULAS) == {moe.score for moe in CASES.values()}
  assert set(ROUTERS) == set(RULES) == {moe.router for moe in CASES.values()}


@pytest.mark.parametrize("name", CASES)
def test_choice_and_weights(name):
  moe = CASES[name]
  routing, x, kernel, bias = route(moe, shift=-3.0 if name == NEGATIVE else 0.0)
  for b in range(2):
    for t in range(20):
      chosen, weights = expected(moe, x[b, t], kernel, bias, int(TOKENS[b, t]))
      assert routing.indices[b, t].tolist() == chosen
      np.testing.assert_allclose(routing.weights[b, t], weights, rtol=1e-5)


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


def test_the_bias_moves_the_choice_and_not_the_weights_and_has_no_gradient():
  config = ModelConfig(embed=16, moe=dataclasses.replace(V3, num_expert_groups=1, topk_groups=1), init_std=0.5)
  with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
    router = Router(config, nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 16)), jnp.float32)
    router.bias = type(router.bias)(jnp.zeros(12).at[7].set(10.0))
    routing = router(x, None)
    assert (routing.indices[..., 0] == 7).all()
    of_seven = routing.scores[..., 7] / jnp.take_along_axis(routing.scores, routing.indices, -1).sum(-1) * 2.5
    np.testing.assert_allclose(routing.weights[..., 0], of_seven, rtol=1e-6)
    graph, params, buffers = nnx.split(router, nnx.Param, ...)
    weights = lambda buffers: jnp.square(nnx.merge(graph, params, buffers)(x, None).weights).sum()
    assert all((g == 0).all() for g in jax.tree.leaves(jax.grad(weights)(buffers)))
    by_kernel = jax.grad(lambda params: jnp.square(nnx.merge(graph, params, buffers)(x, None).weights).sum())(params)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(by_kernel))
