"""Parameters, matrix products and the precision they run in."""

import contextlib
import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.kernels.fp8_linear import Recipe, fp8_linear, fp8_ragged_linear
from deepseek_jax.kernels.grouped_matmul.api import grouped_matmul
from deepseek_jax.kernels.qtensor import FP8, QTensor
from deepseek_jax.kernels.quantize.api import quantize
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.sharding import all_gather_params, spec

# The name, for policies of rematerialisation, of the output of an FP8 layer, in which they see no product.
FP8_OUTPUT = "fp8_product"


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
  """A product without bias: the einsum says which dimensions of the kernel contract, its first and the last of x.

  Where devices share a dimension that contracts, the result is their terms of a sum. In `precision` fp8, by default the
  config's, tiles are per device: of its rows, and of its part of the kernel. `cached`: as in Recipe.
  """

  def __init__(self, shape, axes, config: ModelConfig, rngs, precision=None, cached=True):
    self.kernel = normal_param(shape, axes, config, rngs)
    self.axes = axes
    recipe = Recipe(**dataclasses.asdict(config.fp8), cached=cached)
    self.recipe = recipe if (precision or config.precision) == "fp8" else None

  def weight(self, dtype):
    """The kernel for use. Cast before the all-gather: half the bytes travel in bfloat16."""
    return all_gather_params(self.kernel[...].astype(dtype), *self.axes)

  def __call__(self, equation, x):
    return fused_linear(equation, x, self)[0]

  def product(self, equation, x, weight):
    """As a call, with the `weight` that was made before."""
    return linear(self.recipe, equation, x, weight)[0]


def fused_linear(equation, x, *linears):
  """One product of `x` with each of `linears`: the backward pass of FP8 then needs one copy of `x`."""
  return linear(linears[0].recipe, equation, x, *(linear.weight(x.dtype) for linear in linears))


def linear(recipe, equation, x, *weights):
  """The einsum of `x` with each of `weights`, in FP8 by `recipe`, or in their own dtype without one.

  x: or a pair (gate, up), for silu(gate) * up.
  """
  if recipe is None:
    return [jnp.einsum(equation, swiglu(x), w) for w in weights]
  of_x, of_w, of_y = equation.replace("->", ",").split(",")
  contracted = sum(name in of_x for name in of_w)
  assert of_y == of_x[:-contracted] + of_w[contracted:] and of_x[-contracted:] == of_w[:contracted], equation
  shape = jax.tree.leaves(x)[0].shape
  rows = jax.tree.map(lambda x: x.reshape(-1, math.prod(shape[-contracted:])), x)
  matrices = [w.reshape(math.prod(shape[-contracted:]), -1) for w in weights]
  found = fp8_linear(rows, *matrices, recipe=recipe)
  return [
    checkpoint_name(y.reshape(*shape[:-contracted], *w.shape[contracted:]), FP8_OUTPUT)
    for y, w in zip(found, weights, strict=True)
  ]


def grouped_linear(recipe, x, weights, group_sizes, block, implementation="auto"):
  """As `grouped_matmul` with each of `weights` [groups, k, n], in the precision of `recipe`; `x` as in `linear`.

  implementation: of products without a recipe, which has one of its own.
  """
  if recipe is None:
    x = swiglu(x)
    return [grouped_matmul(x, w, group_sizes, block=block, implementation=implementation) for w in weights]
  return fp8_ragged_linear(x, *weights, group_sizes=group_sizes, step=block, recipe=recipe)


def swiglu(x):
  """silu(gate) * up of a pair (gate, up) (Shazeer 2020), or `x` itself."""
  return jax.nn.silu(x[0]) * x[1] if isinstance(x, tuple) else x


def fwd_and_dgrad_recipes(recipe):
  """(`recipe` of the forward products, that of the gradients of activations), each None where those are not in FP8."""
  return (recipe, recipe) if recipe is None else (recipe if recipe.forward else None, recipe if recipe.dgrad else None)


def quantize_for_dispatch(recipe, x):
  """What of the rows of `x` [rows, width] is sent: FP8 (bytes, uint8; scales [rows, tiles] float32), or (x, none)."""
  if recipe is None:
    return x, jnp.zeros((len(x), 0), jnp.float32)
  q = quantize(x, (1, recipe.block), pow2_scales=recipe.pow2_scales, implementation=recipe.implementation)
  return jax.lax.bitcast_convert_type(q.values, jnp.uint8), q.scales


def dequantize(recipe, rows, scales, dtype):
  """The rows of `quantize_for_dispatch`, in `dtype`.

  Quantised once more they are the same, with scales that differ by the rounding of that dtype; not even that
  where they are powers of two.
  """
  if recipe is None:
    return rows
  # libtpu lays the rows of a message out anew: as bytes, not as the float32 that they are multiplied in.
  values = jax.lax.bitcast_convert_type(jax.lax.optimization_barrier(rows), FP8)
  return QTensor(values, scales, (1, recipe.block)).dequantized().astype(dtype)
