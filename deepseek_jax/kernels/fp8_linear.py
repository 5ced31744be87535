"""Linear layers whose three GEMMs are in FP8: y = x w, dx = dy w^T, dw = x^T dy (V3 report, figure 6).

x and dy are rounded twice, in tiles along each dimension that contracts; w once, in square tiles that serve both. All are
e4m3fn. The forward pass keeps of x the transpose alone, in tiles along the rows, which is what dw reads. Of an x that is a
SwiGLU it keeps the inputs in FP8, and dw reads what is made of them again (section 3.3.3).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.kernels.fp8_grouped_matmul.api import fp8_grouped_matmul, fp8_grouped_wgrad
from deepseek_jax.kernels.fp8_matmul.api import fp8_matmul
from deepseek_jax.kernels.implementations import vary
from deepseek_jax.kernels.qtensor import FP8, QTensor, unquantized
from deepseek_jax.kernels.quantize.api import quantize, quantize_both
from deepseek_jax.kernels.swiglu.api import swiglu_quantize
from deepseek_jax.kernels.swiglu.xla import swiglu

# What the forward pass keeps, by name: for policies of rematerialisation.
ACTIVATION, WEIGHT = "fp8_activation", "fp8_weight"


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Which of the GEMMs are in FP8, and how; the others are in the operands' own dtypes.

  block: size of tiles, and terms of a product between promotions to float32: 128 is the report's.
  pow2_scales: scales are powers of two. implementation: as in `implementations.run`.
  cached: what is kept of x is in FP8; otherwise x itself, of which dw makes the copy that it reads.
  """

  block: int = 128
  pow2_scales: bool = False
  forward: bool = True
  dgrad: bool = True
  wgrad: bool = True
  implementation: str = "auto"
  cached: bool = True


def fp8_linear(x, *weights, recipe=Recipe()):
  """`x` [rows, k] times each of `weights` [k, n]: a tuple of [rows, n] in the dtype of `x`.

  x: or a pair (gate, up) of such arrays, for silu(gate) * up. Layers of one activation belong in one call: its one copy for
  the backward pass then serves all. Gradients have the dtypes of what they are of. Each size is free; last tiles are partial.

  Raises:
    ValueError: an implementation that does not exist, or does not do what `recipe` asks.
  """
  return _products(recipe, None, *vary(None, x, *weights))


def fp8_ragged_linear(x, *weights, group_sizes, step=128, recipe=Recipe()):
  """As `fp8_linear`, of rows sorted by group, each group with its own of `weights` [groups, k, n].

  group_sizes: [groups] int32, any sizes; rows past their sum come out zero. step: as in `fp8_grouped_matmul`, a power of two.
  """
  # A tile has a whole number of steps.
  return _products(recipe, min(step, recipe.block), *vary(group_sizes, x, *weights))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _products(recipe, step, group_sizes, x, *weights):
  nothing_kept = dataclasses.replace(recipe, cached=False)
  return _forward(nothing_kept, step, group_sizes, x, *weights)[0]


def _forward(recipe, step, group_sizes, x, *weights):
  like, pair = jax.tree.leaves(x)[0], isinstance(x, tuple)
  along, kept = _activation(x, recipe.forward, recipe.wgrad and recipe.cached and not pair, recipe)
  if pair:
    kept = tuple(_operand(part, (1, recipe.block), recipe.wgrad, recipe) for part in x)
  elif not recipe.cached:
    kept = x
  w = [_weight(w, recipe.forward, recipe) for w in weights]
  y = tuple(_times(along, w.T, group_sizes, step, like.dtype, recipe) for w in w)
  if recipe.dgrad != recipe.forward:
    w = [_weight(w, recipe.dgrad, recipe) for w in weights]
  dtypes = [jnp.zeros((0,), a.dtype) for a in (like, *weights)]
  return y, (_named(kept, ACTIVATION), _named(w, WEIGHT), group_sizes, dtypes)


def _backward(recipe, step, residuals, gradients):
  kept, weights, group_sizes, (x, *dtypes) = residuals
  down, pair = kept, isinstance(kept, tuple)
  if not isinstance(kept, QTensor):
    inputs = tuple(part.dequantized() for part in kept) if pair else kept
    _, down = _activation(inputs, False, recipe.wgrad, recipe)
  dx, dw = 0, []
  # What is not added to or multiplied further is rounded where it is made: it is then written once.
  dtype = jnp.float32 if pair or len(weights) > 1 else x.dtype
  for dy, w, like in zip(gradients, weights, dtypes, strict=True):
    dy_along, dy_down = _activation(dy, recipe.dgrad, recipe.wgrad, recipe)
    dx += _times(dy_along, w, group_sizes, step, dtype, recipe)
    dw.append(_wgrad(down, dy_down, group_sizes, step, like.dtype, recipe))
  if pair:
    dx = jax.vjp(swiglu, *inputs)[1](dx)
  return None, jax.tree.map(lambda d: d.astype(x.dtype), dx), *dw


_products.defvjp(_forward, _backward)


def _times(a, b, group_sizes, step, dtype, recipe):
  how = _how(a, dtype, recipe)
  return fp8_matmul(a, b, **how) if step is None else fp8_grouped_matmul(a, b, group_sizes, step=step, **how)


def _wgrad(a, b, group_sizes, step, dtype, recipe):
  how = _how(a, dtype, recipe)
  return fp8_matmul(a, b, **how) if step is None else fp8_grouped_wgrad(a, b, group_sizes, step=step, **how)


def _how(a, dtype, recipe):
  # Kernels multiply FP8 alone.
  return {"out_dtype": dtype, "implementation": recipe.implementation if a.values.dtype == FP8 else "xla"}


def _activation(x, along, down, recipe):
  """(`x`, its transpose) as operands, each in FP8 if `along`, if `down`; what is not wanted costs nothing as it is."""
  tile, how = (1, recipe.block), _rounding(recipe)
  if isinstance(x, tuple):
    rounded = swiglu_quantize(*x, recipe.block, **how) if along or down else None
    x = swiglu(*x).astype(x[0].dtype)
    return rounded[0] if along else unquantized(x, tile), rounded[1] if down else unquantized(x.mT, tile)
  if along and down:
    return quantize_both(x, recipe.block, **how)
  return _operand(x, tile, along, recipe), _operand(x.mT, tile, down, recipe)


def _weight(w, is_fp8, recipe):
  return _operand(w, (recipe.block, recipe.block), is_fp8, recipe)


def _operand(x, tile, is_fp8, recipe):
  """`x` in FP8 or as it is."""
  return quantize(x, tile, **_rounding(recipe)) if is_fp8 else unquantized(x, tile)


def _rounding(recipe):
  return {"pow2_scales": recipe.pow2_scales, "implementation": recipe.implementation}


def _named(tree, name):
  return jax.tree.map(lambda a: checkpoint_name(a, name), tree)
