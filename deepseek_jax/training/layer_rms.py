"""The root mean square of each layer's output and of its gradients, with `log.layer_rms`: what vanishes or grows shows."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.model.linear import at_least_float32
from deepseek_jax.model.transformer import layer_names
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.training.step_config import StepConfig
from deepseek_jax.typing import Params


def observe_block_output(x: jax.Array, config: StepConfig) -> dict[str, jax.Array]:
  """{"activations": mean square of each position of `x` [batch, stream, embed], summed, []}; {} where it is off."""
  if not config.layer_rms:
    return {}
  x = jax.lax.stop_gradient(x).astype(at_least_float32(x.dtype))
  return {"activations": jnp.square(x).mean(-1).sum()}


def gradient_mean_squares(grads: Params, config: StepConfig) -> dict[str, dict[str, jax.Array]]:
  """{"gradients": {stack: [layers], over all parameters of a layer}} of the stacks in `grads`; {} where it is off."""
  if not config.layer_rms:
    return {}
  stacks = {name: jax.tree.leaves(grads.get(name, {})) for name in layer_names(config.model)}

  def mean_square(leaves):
    squares = (jnp.square(g.astype(at_least_float32(g.dtype))).sum(tuple(range(1, g.ndim))) for g in leaves)
    return sum(squares) / float(sum(math.prod(g.shape[1:]) for g in leaves))  # an int may be beyond int32

  return {"gradients": {name: mean_square(leaves) for name, leaves in stacks.items() if leaves}}


def activation_metrics(
  model: ModelConfig, mean_squares: dict[str, np.ndarray]
) -> tuple[dict[str, float | int], dict[str, np.ndarray]]:
  """({rms/LAYER/activations: root mean square of the residual stream after the layer}, no histograms)."""
  return _metrics(model, mean_squares, "activations"), {}


def gradient_metrics(model: ModelConfig, mean_squares: dict[str, np.ndarray]) -> dict[str, float | int]:
  """{rms/LAYER/gradients: root mean square of the gradients of the layer's parameters, before clipping}."""
  return _metrics(model, mean_squares, "gradients")


def _metrics(model: ModelConfig, mean_squares: dict[str, np.ndarray], name: str) -> dict[str, float | int]:
  layers = layer_names(model)
  return {
    f"rms/{layer}/{name}": math.sqrt(value)
    for stack, of_stack in mean_squares.items()
    for layer, value in zip(layers[stack], np.asarray(of_stack, np.float64).tolist(), strict=True)
  }
