"""Linear layers whose three GEMMs are in FP8: y = x w, dx = dy w^T, dw = x^T dy (V3 report, figure 6).

x and dy are quantized twice, rowwise and columnwise: in tiles along each dimension that is contracted. w is quantized
once, in square tiles that serve both. All are e4m3fn. The forward pass saves only the columnwise copy of x, which dw
reads. Of an x that is a SwiGLU it saves the inputs in FP8, and dw recomputes it from them (section 3.3.3).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.kernels.fp8_grouped_matmul.api import fp8_grouped_matmul, fp8_grouped_wgrad
from deepseek_jax.kernels.fp8_matmul.api import fp8_matmul
from deepseek_jax.kernels.implementations import match_vma
from deepseek_jax.kernels.qtensor import FP8, QTensor, with_unit_scales
from deepseek_jax.kernels.quantize.api import quantize, quantize_both
from deepseek_jax.kernels.swiglu.api import swiglu_quantize
from deepseek_jax.kernels.swiglu.xla import swiglu_float32

# Names of what the forward pass saves, for rematerialization policies.
FP8_ACTIVATION, FP8_WEIGHT = "fp8_activation", "fp8_weight"


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Which of the GEMMs are in FP8, and how; the others are in the operands' own dtypes.

  block: size of tiles, and of k between promotions to float32: 128 is the report's.
  pow2_scales: scales are powers of two.
  forward, dgrad, wgrad: whether y, dx, dw is an FP8 GEMM.
  implementation: as in `implementations.call_kernel`.
  fp8_residual: x is saved for the backward pass in FP8; otherwise as it is, and dw quantizes it.
  """

  block: int = 128
  pow2_scales: bool = False
  forward: bool = True
  dgrad: bool = True
  wgrad: bool = True
  implementation: str = "auto"
  fp8_residual: bool = True


def fp8_linear(
  x: jax.Array | tuple[jax.Array, jax.Array], *weights: jax.Array, recipe: Recipe = Recipe()
) -> tuple[jax.Array, ...]:
  """`x` [rows, k] times each of `weights` [k, n]: a tuple of [rows, n] in the dtype of `x`.

  x: or a pair (gate, up) of such arrays, for silu(gate) * up. Layers of one activation belong in one call, which saves
  one copy of it for all of them. Gradients have the dtypes of their primals. Each size is free; last tiles are partial.

  Raises:
    ValueError: an implementation that does not exist, or does not support what `recipe` asks.
  """
  return _fp8_matmuls(recipe, None, *match_vma(None, x, *weights))


def fp8_ragged_linear(
  x: jax.Array | tuple[jax.Array, jax.Array],
  *weights: jax.Array,
  group_sizes: jax.Array,
  step: int = 128,
  recipe: Recipe = Recipe(),
) -> tuple[jax.Array, ...]:
  """As `fp8_linear`, of rows sorted by group, each group with its own of `weights` [groups, k, n].

  group_sizes: [groups] int32, any sizes; rows past their sum come out zero. step: as in `fp8_grouped_matmul`, a power
  of two.
  """
  # A tile is a multiple of a step.
  return _fp8_matmuls(recipe, min(step, recipe.block), *match_vma(group_sizes, x, *weights))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fp8_matmuls(recipe, step, group_sizes, x, *weights):
  """step: None for one matrix; otherwise `weights` are by group."""
  without_residual = dataclasses.replace(recipe, fp8_residual=False)
  return _fp8_matmuls_fwd(without_residual, step, group_sizes, x, *weights)[0]


def _fp8_matmuls_fwd(recipe, step, group_sizes, x, *weights):
  like, is_swiglu = jax.tree.leaves(x)[0], isinstance(x, tuple)
  save_columnwise = recipe.wgrad and recipe.fp8_residual and not is_swiglu
  rowwise, columnwise = _activation_operands(x, recipe.forward, save_columnwise, recipe)
  saved_x: Any = columnwise
  if is_swiglu:
    saved_x = tuple(_operand(half, (1, recipe.block), recipe.wgrad, recipe) for half in x)
  elif not recipe.fp8_residual:
    saved_x = x
  w = [_weight_operand(w, recipe.forward, recipe) for w in weights]
  y = tuple(_matmul(rowwise, w.T, group_sizes, step, like.dtype, recipe) for w in w)
  if recipe.dgrad != recipe.forward:
    w = [_weight_operand(w, recipe.dgrad, recipe) for w in weights]
  dtypes = [jnp.zeros((0,), a.dtype) for a in (like, *weights)]
  return y, (_named(saved_x, FP8_ACTIVATION), _named(w, FP8_WEIGHT), group_sizes, dtypes)


def _fp8_matmuls_bwd(recipe, step, residuals, gradients):
  saved_x, weights, group_sizes, (x, *dtypes) = residuals
  columnwise, is_swiglu = saved_x, isinstance(saved_x, tuple)
  if not isinstance(saved_x, QTensor):
    inputs = tuple(half.dequantize() for half in saved_x) if is_swiglu else saved_x
    _, columnwise = _activation_operands(inputs, False, recipe.wgrad, recipe)
  dx, dw = 0, []
  # A dx that needs no further arithmetic is written by its GEMM in the dtype of x.
  dtype = jnp.float32 if is_swiglu or len(weights) > 1 else x.dtype
  for dy, w, like in zip(gradients, weights, dtypes, strict=True):
    dy_rowwise, dy_columnwise = _activation_operands(dy, recipe.dgrad, recipe.wgrad, recipe)
    dx += _matmul(dy_rowwise, w, group_sizes, step, dtype, recipe)
    dw.append(_wgrad(columnwise, dy_columnwise, group_sizes, step, like.dtype, recipe))
  if is_swiglu:
    dx = jax.vjp(swiglu_float32, *inputs)[1](dx)
  return None, jax.tree.map(lambda d: d.astype(x.dtype), dx), *dw


_fp8_matmuls.defvjp(_fp8_matmuls_fwd, _fp8_matmuls_bwd)


def _matmul(a, b, group_sizes, step, dtype, recipe):
  options = _matmul_options(a, dtype, recipe)
  return fp8_matmul(a, b, **options) if step is None else fp8_grouped_matmul(a, b, group_sizes, step=step, **options)


def _wgrad(a, b, group_sizes, step, dtype, recipe):
  options = _matmul_options(a, dtype, recipe)
  return fp8_matmul(a, b, **options) if step is None else fp8_grouped_wgrad(a, b, group_sizes, step=step, **options)


def _matmul_options(a: QTensor, dtype, recipe: Recipe) -> dict[str, Any]:
  # Pallas kernels multiply only FP8.
  return {"out_dtype": dtype, "implementation": recipe.implementation if a.values.dtype == FP8 else "xla"}


def _activation_operands(x, fp8_rowwise: bool, fp8_columnwise: bool, recipe: Recipe) -> tuple[QTensor, QTensor]:
  """(rowwise, columnwise): `x` and its transpose as operands, each in FP8 where so asked.

  A copy that the caller does not use is not in FP8, and XLA removes it.
  """
  tile, options = (1, recipe.block), _quantize_options(recipe)
  if isinstance(x, tuple):
    gate, up = x
    quantized = swiglu_quantize(gate, up, recipe.block, **options) if fp8_rowwise or fp8_columnwise else None
    x = swiglu_float32(gate, up).astype(gate.dtype)
    rowwise = quantized[0] if quantized and fp8_rowwise else with_unit_scales(x, tile)
    columnwise = quantized[1] if quantized and fp8_columnwise else with_unit_scales(x.mT, tile)
    return rowwise, columnwise
  if fp8_rowwise and fp8_columnwise:
    return quantize_both(x, recipe.block, **options)
  return _operand(x, tile, fp8_rowwise, recipe), _operand(x.mT, tile, fp8_columnwise, recipe)


def _weight_operand(w, is_fp8, recipe):
  return _operand(w, (recipe.block, recipe.block), is_fp8, recipe)


def _operand(x, tile, is_fp8, recipe):
  """`x` in FP8, or as it is."""
  return quantize(x, tile, **_quantize_options(recipe)) if is_fp8 else with_unit_scales(x, tile)


def _quantize_options(recipe: Recipe) -> dict[str, Any]:
  return {"pow2_scales": recipe.pow2_scales, "implementation": recipe.implementation}


def _named(tree, name):
  """`tree` under a name that rematerialization policies know."""
  return jax.tree.map(lambda a: checkpoint_name(a, name), tree)
