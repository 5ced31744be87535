import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from deepseek_jax.config_sections import LogConfig
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.transformer import graphdef
from deepseek_jax.sharding import spec
from deepseek_jax.training.layer_aux import logged_metrics
from deepseek_jax.training.layer_rms import gradient_mean_squares
from deepseek_jax.training.schedule import StepInputs
from deepseek_jax.training.step import abstract_step
from deepseek_jax.training.step_config import StepConfig
from tests.configs import GQA, MOE, V3, float64, make_config
from tests.steps import make_state, make_step_with_grads

SEQ, BATCH = 8, 4
MODEL = dataclasses.replace(
  V3, embed=16, mlp=16, layers=2, attention=dataclasses.replace(GQA, heads=2, kv_heads=2),
  moe=dataclasses.replace(MOE, mlp=8),
)  # fmt: skip
CONFIG = dataclasses.replace(float64(make_config(MODEL, SEQ, BATCH)), log=LogConfig(layer_rms=True))


def test_off_they_are_not_computed():
  mesh = make_mesh(CONFIG.mesh, jax.devices()[:1])
  for config, expected in (
    (CONFIG, {"activations", "gradients"}),
    (dataclasses.replace(CONFIG, log=LogConfig(layer_rms=False)), set()),
  ):
    with jax.enable_x64(True), jax.set_mesh(mesh):
      program, arguments = abstract_step(config, mesh)
      _, metrics = jax.eval_shape(program, *arguments)
    assert metrics.keys() & {"activations", "gradients"} == expected


def step(config):
  """(state before, tokens, metrics, gradients) of an update on one device."""
  mesh = make_mesh(config.mesh, jax.devices()[:1])
  with jax.enable_x64(True), jax.set_mesh(mesh):
    state = make_state(config, mesh)
    tokens = np.random.default_rng(0).integers(0, 64, (1, BATCH, SEQ + 1)).astype(np.int32)
    batch = jax.device_put(tokens, NamedSharding(mesh, spec(None, "batch", None)))
    inputs = StepInputs(1e-2, 0.3, 1e-2).as_arrays("float64")
    _, metrics, grads = jax.jit(make_step_with_grads(config), static_argnums=2)(state, batch, 1, inputs)
    return jax.device_get((state, tokens[0], metrics, grads))


def test_they_are_those_of_the_layers_outputs_and_gradients():
  state, tokens, metrics, grads = step(CONFIG)
  scalars, _ = logged_metrics(CONFIG.model, metrics)
  with jax.enable_x64(True), jax.set_mesh(make_mesh(CONFIG.mesh, jax.devices()[:1])):
    model = nnx.merge(graphdef(CONFIG.model), state.params, state.buffers)
    forward = jax.jit(lambda model, ids: model(ids, aux_fn=lambda output: output.aux["output"])[1])
    outputs = forward(model, jnp.asarray(tokens[:, :-1]))
  for layer, x in (("layer_0", outputs["dense_layers"]), ("layer_1", outputs["moe_layers"])):
    assert scalars[f"rms/{layer}/activations"] == pytest.approx(np.sqrt(np.square(x).mean()), rel=1e-12)
  for layer, stack in (("layer_0", "dense_layers"), ("layer_1", "moe_layers"), ("mtp_1", "mtp_layers")):
    flat = np.concatenate([g.ravel() for g in jax.tree.leaves(grads[stack])])
    assert scalars[f"rms/{layer}/gradients"] == pytest.approx(np.sqrt(np.square(flat).mean()), rel=1e-12)
  assert scalars["rms/mtp_1/activations"] > 0


def test_stacks_without_trained_parameters_have_none():
  grads = {"moe_layers": {"a": jnp.full((2, 3), 2.0), "b": jnp.zeros((2, 5))}, "embed": jnp.ones(3)}
  found = gradient_mean_squares(grads, StepConfig(MODEL, layer_rms=True))
  assert {stack: x.tolist() for stack, x in found["gradients"].items()} == {"moe_layers": [1.5, 1.5]}


def test_a_layer_may_have_more_parameters_than_int32_counts():
  grads = {"moe_layers": {"a": jax.ShapeDtypeStruct((58, 256, 7168, 6144), jnp.bfloat16)}}
  found = jax.eval_shape(lambda grads: gradient_mean_squares(grads, StepConfig(MODEL, layer_rms=True)), grads)
  assert (found["gradients"]["moe_layers"].shape, found["gradients"]["moe_layers"].dtype) == ((58,), jnp.float32)
