"""Frozen parameters: no gradient is computed, no state kept, nothing moves; what is trained moves as it did."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from deepseek_jax.config_sections import MeshConfig, ParallelConfig
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.transformer import graphdef
from deepseek_jax.optimizers.optimizer import make_optimizer
from deepseek_jax.optimizers.trainable import split_trainable
from deepseek_jax.plan.memory import estimate_memory
from deepseek_jax.sharding import spec
from deepseek_jax.training.schedule import StepInputs
from deepseek_jax.training.state import abstract_state
from deepseek_jax.training.step import make_gradients
from deepseek_jax.training.step_config import StepConfig
from tests.configs import DENSE, MOE, float64, make_config
from tests.steps import make_state, make_step_with_grads

SEQ, BATCH = 8, 4
MODEL = dataclasses.replace(DENSE, layers=3, first_dense_layers=1, moe=MOE)
CONFIG = float64(make_config(MODEL, SEQ, BATCH, 2))
LEARNING_RATE = 1e-2
PATTERNS = ("*/attn/q/kernel", "moe_layers/moe/experts/down/*", "dense_layers/mlp_norm/*")


def with_trainable(config, patterns=PATTERNS, zero=3, optimizer=(), **axes):
  """optimizer: more of its fields. Nothing is clipped: the norm of all gradients is not that of some."""
  return dataclasses.replace(
    config, parallel=ParallelConfig(zero=zero), mesh=MeshConfig(**{"data": 1, **axes}),
    optimizer=dataclasses.replace(config.optimizer, trainable=patterns, clip=1e9, **dict(optimizer)),
  )  # fmt: skip


def run(config):
  """(state before, state after, gradients)."""
  mesh = make_mesh(config.mesh, jax.devices()[: int(np.prod(dataclasses.astuple(config.mesh)))])
  with jax.enable_x64(True), jax.set_mesh(mesh):
    state = make_state(config, mesh)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 2, SEQ + 1)).astype(np.int32)
    batch = jax.device_put(tokens, NamedSharding(mesh, spec(None, "batch", None)))
    inputs = StepInputs(LEARNING_RATE, 0.0, 1e-2).as_arrays("float64")
    after, _, grads = jax.block_until_ready(
      jax.jit(make_step_with_grads(config), static_argnums=2)(state, batch, 2, inputs)
    )
    return jax.device_get((state, after, grads))


@pytest.fixture(scope="module")
def all_trained():
  """(parameters, gradients) where all are trained."""
  before, _, grads = run(with_trainable(CONFIG, ()))
  return before.params, grads


def first_update(kind, params, grads):
  """Parameters after the first update, where all are trained."""
  config = with_trainable(CONFIG, (), optimizer={"kind": kind})
  with jax.enable_x64(True), jax.set_mesh(make_mesh(config.mesh, jax.devices()[:1])):
    tx = make_optimizer(config.optimizer, config.model)
    updates = jax.jit(lambda params, grads: tx.update(grads, tx.init(params), params)[0])(params, grads)
    return jax.tree.map(lambda p, u: p - LEARNING_RATE * u, params, jax.device_get(updates))


@pytest.mark.parametrize(
  ("kind", "zero", "offload", "axes"),
  [
    ("adamw", 1, False, dict(expert=2, tensor=2)),
    ("muon", 2, True, dict(fsdp=2)),
    ("muon", 3, False, dict(stage=2)),
    pytest.param("adamw", 3, True, {}, marks=pytest.mark.meshes),
    pytest.param("adamw", 1, False, dict(stage=2, fsdp=2), marks=pytest.mark.meshes),
  ],
  ids=str,
)
def test_only_what_is_selected_has_gradients_and_moves_as_where_all_is_trained(all_trained, kind, zero, offload, axes):
  optimizer = {"kind": kind, "offload": offload}
  before, after, grads = run(with_trainable(CONFIG, zero=zero, optimizer=optimizer, **axes))
  params, all_grads = all_trained
  expected, _ = split_trainable(all_grads, PATTERNS)
  assert len(jax.tree.leaves(expected)) == 4
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), grads, expected)
  (moved, stayed), (old, kept) = (split_trainable(state.params, PATTERNS) for state in (after, before))
  jax.tree.map(np.testing.assert_array_equal, stayed, kept)
  expected, _ = split_trainable(first_update(kind, params, all_grads), PATTERNS)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9), moved, expected)
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), moved, old)))
  moments = sum(x.size for x in jax.tree.leaves(after.opt_state) if x.ndim)
  vectors = sum(x.size for path, x in jax.tree.leaves_with_path(old) if path[-1].key == "scale")
  matrices = sum(x.size for x in jax.tree.leaves(old)) - vectors
  assert moments == 2 * vectors + (1 if kind == "muon" else 2) * matrices


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
