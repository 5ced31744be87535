"""Parameters, matrix products and the precision they run in."""

import contextlib

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model_config import ModelConfig
from deepseek_jax.sharding import gathered, spec


def at_least_float32(dtype):
  """float32, or `dtype` when it is wider: a float64 run stays float64 throughout."""
  return jnp.promote_types(dtype, jnp.float32)


def matmul_precision(config: ModelConfig):
  """Context in which float32 products are full float32: TPUs and GPUs otherwise multiply them in fewer bits."""
  return contextlib.nullcontext() if config.compute_dtype == "bfloat16" else jax.default_matmul_precision("highest")


def normal_param(shape, axes, config: ModelConfig, rngs):
  """An initial matrix, N(0, init_std^2), born in the layout of its logical `axes`, which the parameter remembers."""
  init = jax.nn.initializers.normal(config.init_std)
  matrix = init(rngs.params(), shape, jnp.dtype(config.param_dtype), out_sharding=spec(*axes))
  return nnx.Param(matrix, logical=axes)


class Linear(nnx.Module):
  """A product without bias: the einsum says which dimensions of the kernel contract.

  Where devices share a dimension that contracts, the result is their terms of a sum.
  """

  def __init__(self, shape, axes, config: ModelConfig, rngs):
    self.kernel = normal_param(shape, axes, config, rngs)
    self.axes = axes

  def weight(self, dtype):
    """The kernel for use. Cast before the all-gather: half the bytes travel in bfloat16."""
    return gathered(self.kernel[...].astype(dtype), *self.axes)

  def __call__(self, equation, x):
    return jnp.einsum(equation, x, self.weight(x.dtype))
