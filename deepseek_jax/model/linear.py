"""Parameters, matrix products and the precision they run in."""

import contextlib
import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from deepseek_jax.kernels.fp8_linear import Recipe, fp8_linear, fp8_ragged_linear
from deepseek_jax.kernels.grouped_matmul.api import grouped_matmul
from deepseek_jax.kernels.qtensor import FP8, QTensor
from deepseek_jax.kernels.quantize.api import quantize
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.sharding import all_gather_params, spec

# Name of the outputs of FP8 GEMMs, for rematerialization policies: they see no matrix product in a custom_vjp.
FP8_OUTPUT = "fp8_output"

# What a linear layer takes: an array, or a pair (gate, up), which stands for silu(gate) * up.
LinearInput = jax.Array | tuple[jax.Array, jax.Array]


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
  """float32, or `dtype` when it is wider: a float64 run stays float64 throughout."""
  return jnp.promote_types(dtype, jnp.float32)


def matmul_precision(config: ModelConfig) -> contextlib.AbstractContextManager:
  """Context in which float32 products are full float32: TPUs and GPUs otherwise multiply them in fewer bits."""
  return contextlib.nullcontext() if config.compute_dtype == "bfloat16" else jax.default_matmul_precision("highest")


def normal_param(
  shape: tuple[int, ...], axes: tuple[str | None, ...], config: ModelConfig, rngs: nnx.Rngs | None
) -> nnx.Param:
  """A matrix from N(0, init_std^2), created with the sharding of its logical `axes`, which its metadata keeps.

  rngs: None: zeros, which stand for the shape. A random matrix takes about 17 ms to trace, and a model has dozens.
  """
  dtype, sharding = jnp.dtype(config.param_dtype), spec(*axes)
  if rngs is None:
    matrix = jnp.zeros(shape, dtype, out_sharding=sharding)
  else:
    matrix = jax.nn.initializers.normal(config.init_std)(rngs.params(), shape, dtype, out_sharding=sharding)
  return nnx.Param(matrix, logical=axes)


class Linear(nnx.Module):
  """A linear layer without bias: an einsum that contracts x's last dimensions with the kernel's first.

  Where devices share a contracted dimension, each device's result is a partial sum. In FP8, tiles are per device: of
  its rows, and of its shard of the kernel.

  Args:
    shape, axes: of the kernel: sizes and logical axes.
    precision: bf16 or fp8, default `config.precision`.
    fp8_residual: as in Recipe.
  """

  def __init__(
    self,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    config: ModelConfig,
    rngs: nnx.Rngs | None,
    precision: str | None = None,
    fp8_residual: bool = True,
  ):
    self.kernel = normal_param(shape, axes, config, rngs)
    self.axes = axes
    recipe = Recipe(**dataclasses.asdict(config.fp8), fp8_residual=fp8_residual)
    self.recipe = recipe if (precision or config.precision) == "fp8" else None

  def weight(self, dtype: DTypeLike) -> jax.Array:
    """The all-gathered kernel. It is cast before the all-gather, which then sends half the bytes in bfloat16."""
    return all_gather_params(self.kernel[...].astype(dtype), *self.axes)

  def __call__(self, equation: str, x: jax.Array) -> jax.Array:
    """The einsum of `x` and the kernel."""
    return fused_linear(equation, x, self)[0]

  def einsum(self, equation: str, x: LinearInput, weight: jax.Array) -> jax.Array:
    """As `__call__`, with a `weight` that was all-gathered before."""
    return linear(self.recipe, equation, x, weight)[0]


def fused_linear(equation: str, x: jax.Array, *layers: Linear) -> list[jax.Array]:
  """The einsum of `x` with each of `layers`: in FP8, the backward pass then keeps one quantized copy of `x`."""
  return linear(layers[0].recipe, equation, x, *(layer.weight(x.dtype) for layer in layers))


def linear(recipe: Recipe | None, equation: str, x: LinearInput, *weights: jax.Array) -> list[jax.Array]:
  """The einsum of `x` with each of `weights`: FP8 GEMMs by `recipe`, or in their own dtype without one."""
  if recipe is None:
    return [jnp.einsum(equation, apply_swiglu(x), w) for w in weights]
  x_dims, w_dims, y_dims = equation.replace("->", ",").split(",")
  contracted = sum(name in x_dims for name in w_dims)
  assert y_dims == x_dims[:-contracted] + w_dims[contracted:] and x_dims[-contracted:] == w_dims[:contracted], equation
  shape = jax.tree.leaves(x)[0].shape
  k = math.prod(shape[-contracted:])
  x_2d = jax.tree.map(lambda x: x.reshape(-1, k), x)
  weights_2d = [w.reshape(k, -1) for w in weights]
  outputs = fp8_linear(x_2d, *weights_2d, recipe=recipe)
  return [
    checkpoint_name(y.reshape(*shape[:-contracted], *w.shape[contracted:]), FP8_OUTPUT)
    for y, w in zip(outputs, weights, strict=True)
  ]


def grouped_linear(
  recipe: Recipe | None,
  x: LinearInput,
  weights: tuple[jax.Array, ...],
  group_sizes: jax.Array,
  block: int,
  implementation: str = "auto",
) -> list[jax.Array]:
  """The grouped matmul of `x` [rows, k] with each of `weights` [groups, k, n]: [rows, n] each.

  group_sizes, block: as in `grouped_matmul`. implementation: of grouped matmuls without a recipe, which has its own.
  """
  if recipe is None:
    x = apply_swiglu(x)
    return [grouped_matmul(x, w, group_sizes, block=block, implementation=implementation) for w in weights]
  return list(fp8_ragged_linear(x, *weights, group_sizes=group_sizes, step=block, recipe=recipe))


def apply_swiglu(x: LinearInput) -> jax.Array:
  """silu(gate) * up of a pair (gate, up) (Shazeer 2020), or `x` itself."""
  return jax.nn.silu(x[0]) * x[1] if isinstance(x, tuple) else x


def fwd_and_dgrad_recipes(recipe: Recipe | None) -> tuple[Recipe | None, Recipe | None]:
  """`recipe` for the forward pass and for gradients of activations, each None where that is not in FP8."""
  if recipe is None:
    return None, None
  return (recipe if recipe.forward else None), (recipe if recipe.dgrad else None)


def quantize_for_dispatch(recipe: Recipe | None, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """What is sent of `x` [rows, width]: FP8 values as uint8, scales [rows, tiles] float32; or x and scales [rows, 0]."""
  if recipe is None:
    return x, jnp.zeros((len(x), 0), jnp.float32)
  q = quantize(x, (1, recipe.block), pow2_scales=recipe.pow2_scales, implementation=recipe.implementation)
  return jax.lax.bitcast_convert_type(q.values, jnp.uint8), q.scales


def dequantize(recipe: Recipe | None, values: jax.Array, scales: jax.Array, dtype: DTypeLike) -> jax.Array:
  """The inverse of `quantize_for_dispatch`, in `dtype`.

  Quantizing the result again gives the same values. Scales then differ by the rounding of `dtype`, or not at all where
  they are powers of two.
  """
  if recipe is None:
    return values
  # The barrier keeps libtpu from relaying out the message as float32, four times its bytes.
  values = jax.lax.bitcast_convert_type(jax.lax.optimization_barrier(values), FP8)
  return QTensor(values, scales, (1, recipe.block)).dequantize().astype(dtype)
