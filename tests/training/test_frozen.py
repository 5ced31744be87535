"""Frozen parameters: no gradient is computed, no state kept, nothing moves; what is trained moves as it did."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from deepseek_jax.config_sections import MeshConfig, ParallelConfig
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.transformer import graphdef
from deepseek_jax.optimizers.trainable import split_trainable
from deepseek_jax.plan.memory import estimate_memory
from deepseek_jax.sharding import spec
from deepseek_jax.training.schedule import StepInputs
from deepseek_jax.training.state import abstract_state
from deepseek_jax.training.step import make_gradients
from deepseek_jax.training.step_config import StepConfig
from tests.configs import DENSE, MOE, make_config
from tests.steps import make_state, make_step_with_grads

SEQ, BATCH = 8, 4
MODEL = dataclasses.replace(DENSE, layers=3, first_dense_layers=1, moe=MOE)
CONFIG = make_config(MODEL, SEQ, BATCH, 2)
PATTERNS = ("*/attn/q/kernel", "moe_layers/moe/experts/down/*", "dense_layers/mlp_norm/*")


def with_trainable(config, patterns=PATTERNS, zero=3, **axes):
  return dataclasses.replace(
    config, optimizer=dataclasses.replace(config.optimizer, trainable=patterns), parallel=ParallelConfig(zero=zero),
    mesh=MeshConfig(**{"data": 1, **axes}),
  )  # fmt: skip


def run(config):
  """(state before, state after, gradients)."""
  mesh = make_mesh(config.mesh, jax.devices()[: int(np.prod(dataclasses.astuple(config.mesh)))])
  with jax.set_mesh(mesh):
    state = make_state(config, mesh)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 2, SEQ + 1)).astype(np.int32)
    batch = jax.device_put(tokens, NamedSharding(mesh, spec(None, "batch", None)))
    inputs = StepInputs(1e-2, 0.0, 1e-2).as_arrays("float32")
    after, _, grads = jax.block_until_ready(
      jax.jit(make_step_with_grads(config), static_argnums=2)(state, batch, 2, inputs)
    )
    return jax.device_get((state, after, grads))


@pytest.fixture(scope="module")
def all_trained():
  return run(with_trainable(CONFIG, ()))


@pytest.mark.parametrize(
  ("zero", "axes"),
  [
    (1, dict(expert=2, tensor=2)),
    (3, dict(stage=2)),
    pytest.param(3, {}, marks=pytest.mark.meshes),
    pytest.param(1, dict(stage=2, fsdp=2), marks=pytest.mark.meshes),
  ],
  ids=str,
)
def test_only_what_is_selected_has_gradients_and_moves(all_trained, zero, axes):
  before, after, grads = run(with_trainable(CONFIG, zero=zero, **axes))
  expected, _ = split_trainable(all_trained[2], PATTERNS)
  assert len(jax.tree.leaves(expected)) == 4
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6), grads, expected)
  (moved, stayed), (old, kept) = (split_trainable(state.params, PATTERNS) for state in (after, before))
  jax.tree.map(np.testing.assert_array_equal, stayed, kept)
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), moved, old)))
  moments = [x for x in jax.tree.leaves(after.opt_state) if x.ndim]
  assert sum(x.size for x in moments) == 2 * sum(x.size for x in jax.tree.leaves(old))


def gradient_flops(config):
  """FLOPs of the compiled gradients of one microbatch."""
  mesh, step_config = make_mesh(config.mesh, jax.devices()[:1]), StepConfig.of(config, bos=0)
  with jax.set_mesh(mesh):
    batch = jax.ShapeDtypeStruct((1, 2, SEQ + 1), "int32", sharding=NamedSharding(mesh, spec(None, "batch", None)))
    weight = StepInputs.abstract("float32").mtp_weight
    gradients = jax.jit(make_gradients(step_config, graphdef(config.model)), static_argnums=2)
    return gradients.lower(abstract_state(step_config, mesh), batch, 1, weight).compile().cost_analysis()["flops"]


def test_frozen_parameters_cost_no_gradient_and_no_memory():
  """What is left of three matrix products: the forward pass, and the gradients of activations."""
  dense = make_config(dataclasses.replace(DENSE, vocab=16, mlp=512, remat="none"), SEQ, BATCH, 2)
  configs = [with_trainable(dense, patterns) for patterns in ((), ("*/attn_norm/scale",))]
  every, one = map(gradient_flops, configs)
  assert 0.6 < one / every < 0.72
  every, one = map(estimate_memory, configs)
  assert one.optimizer == 2 * 4 * dense.model.layers * dense.model.embed and every.params == one.params
  assert one.gradients < 0.01 * every.gradients
