"""What tests of the update share: a first state that needs no program, the update with its gradients, what compiles."""

import contextlib
import dataclasses

import jax
import jax.monitoring
import numpy as np

from deepseek_jax.model.transformer import graphdef
from deepseek_jax.training.state import abstract_state
from deepseek_jax.training.step import make_apply_gradients, make_gradients
from deepseek_jax.training.step_config import StepConfig


def make_state(config, mesh):
  """A first TrainState on `mesh`, of NumPy's noise, and so equal on every mesh. init_state's program takes as long to
  compile as the update's."""
  abstract, rng = abstract_state(StepConfig.of(config, bos=0), mesh), np.random.default_rng(config.seed)

  def param(path, x):
    scale = path[-1].key == "scale"
    return (np.ones(x.shape) if scale else rng.normal(0, config.model.init_std, x.shape)).astype(x.dtype)

  state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
  state = dataclasses.replace(state, params=jax.tree.map_with_path(param, abstract.params))
  return jax.block_until_ready(jax.device_put(state, jax.tree.map(lambda x: x.sharding, abstract)))


def make_step_with_grads(config, bos=0):
  """make_train_step of the same functions: (state, batch, microbatches, inputs) -> (state, metrics, gradients)."""
  config = StepConfig.of(config, bos)
  gradients, apply_gradients = make_gradients(config, graphdef(config.model)), make_apply_gradients(config)

  def step(state, batch, microbatches, inputs):
    grads, metrics = gradients(state, batch, microbatches, inputs.mtp_weight)
    return *apply_gradients(state, grads, metrics, inputs), grads

  return step


@contextlib.contextmanager
def compilations():
  """Gives a list to which the names of the programs that are compiled in the block are added, also those from a cache."""
  names = []

  def listener(event, duration, **metadata):
    if event == "/jax/core/compile/backend_compile_duration":
      names.append(metadata["fun_name"])

  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    yield names
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)
