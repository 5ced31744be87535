"""The router against the papers' rules, written one token at a time in NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config_sections import MeshConfig
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.batch_context import BatchContext
from deepseek_jax.model.router import SCORES, RouterBias
from deepseek_jax.model.router_kinds import ROUTERS
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


# The tokens' batch context in inference: one document, no padding.
CONTEXT = BatchContext(
  rotation=(jnp.ones((1, 20, 1, 2)), jnp.zeros((1, 20, 1, 2))), token_ids=jnp.asarray(TOKENS), segment_ids=None,
  token_mask=None, no_drop=None, sequence_ids=jnp.arange(2), position_ids=jnp.arange(20),
)  # fmt: skip


def make_router(moe):
  """The router of `moe`, and random x [batch, seq, embed]."""
  config = ModelConfig(embed=16, moe=moe, init_std=0.5, compute_dtype="float32")
  with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
    router = ROUTERS[moe.router](config, nnx.Rngs(0))
  return router, np.random.default_rng(0).normal(size=(2, 20, 16)).astype(np.float32)


def route(moe, shift=0.0):
  """(Routing, x, kernel, bias) of random tokens."""
  router, x = make_router(moe)
  bias = np.zeros(12, np.float32)
  if moe.router_bias:
    bias = np.random.default_rng(1).normal(size=12).astype(np.float32) * 0.2 + np.float32(shift)
    router.bias = RouterBias(jnp.asarray(bias))
  with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
    return jax.device_get(router(jnp.asarray(x), CONTEXT)), x, np.asarray(router.kernel[...]), bias


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


@pytest.mark.parametrize("name", CASES)
def test_every_router_gives_what_the_rest_of_the_model_relies_on(name):
  moe = CASES[name]
  router, x = make_router(moe)
  graph, params, buffers = nnx.split(router, nnx.Param, ...)
  types = {type(buffer) for buffer in jax.tree.leaves(buffers, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))}
  assert (RouterBias in types) == moe.router_bias

  def weights(params, buffers):
    routing = nnx.merge(graph, params, buffers)(jnp.asarray(x), CONTEXT)
    return jnp.square(routing.weights).sum(), routing

  with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
    (by_params, by_buffers), routing = jax.grad(weights, (0, 1), has_aux=True)(params, buffers)
  assert any(np.abs(gradient).max() > 0 for gradient in jax.tree.leaves(by_params))
  assert all((gradient == 0).all() for gradient in jax.tree.leaves(by_buffers))
  assert routing.indices.dtype == jnp.int32 and routing.indices.shape == (2, 20, moe.num_experts_per_token)
  indices = np.sort(routing.indices, -1)
  assert (indices >= 0).all() and (indices <= 12).all()  # 12: no assignment
  assert ((np.diff(indices) > 0) | (indices[..., 1:] == 12)).all()  # a token's experts differ
  assert routing.logits.shape == routing.scores.shape == (2, 20, 12) and (routing.scores > 0).all()
  assert routing.weights.dtype == routing.scores.dtype == routing.logits.dtype == jnp.float32


def test_the_bias_moves_the_choice_and_not_the_weights():
  router, x = make_router(dataclasses.replace(V3, num_expert_groups=1, topk_groups=1))
  router.bias = RouterBias(jnp.zeros(12).at[7].set(10.0))
  with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
    routing = router(jnp.asarray(x), CONTEXT)
  assert (routing.indices[..., 0] == 7).all()
  of_seven = routing.scores[..., 7] / jnp.take_along_axis(routing.scores, routing.indices, -1).sum(-1) * 2.5
  np.testing.assert_allclose(routing.weights[..., 0], of_seven, rtol=1e-6)
