"""A loop over blocks of the contraction, each of which XLA multiplies."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.kernels.implementations import match_vma
from deepseek_jax.kernels.qtensor import FP8, QTensor


def matmul(a: QTensor, b: QTensor, out_dtype: DTypeLike) -> jax.Array:
  if FP8 not in (a.values.dtype, b.values.dtype):  # all scales are then 1
    return unscaled_matmul(a.values, b.values).astype(out_dtype)
  return blockwise_matmul(pad_contraction(a), pad_contraction(b)).astype(out_dtype)


def blockwise_matmul(a: QTensor, b: QTensor) -> jax.Array:
  """`a` [m, k] times the transpose of `b` [n, k], [m, n] float32; k is a multiple of the tiles' width."""
  block, (m, n), steps = a.tile[1], (a.shape[0], b.shape[0]), a.scales.shape[1]

  def step(i, total):
    lhs, rhs = (jax.lax.dynamic_slice_in_dim(q.values, i * block, block, 1) for q in (a, b))
    return total + unscaled_matmul(lhs, rhs) * row_scales(a, i)[:, None] * row_scales(b, i)

  return jax.lax.fori_loop(0, steps, step, match_vma(jnp.zeros((m, n)), a.values, b.values)[0])


def unscaled_matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  """`a` [m, k] times the transpose of `b` [n, k], without scales, in float32.

  Operands are cast to float32: CPUs do not have every product of bfloat16 (jax 0.10.2). Values of FP8 and bfloat16 are
  exact in the fewer bits that chips multiply by default.
  """
  exact = all(x.dtype in (FP8, jnp.bfloat16) for x in (a, b))
  precision = jax.lax.Precision.DEFAULT if exact else jax.lax.Precision.HIGHEST
  a, b = (x.astype(jnp.float32) for x in (a, b))
  return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def row_scales(q: QTensor, i: int | jax.Array) -> jax.Array:
  """The scale of each row of `q` [rows, columns] in its i-th column of tiles: [rows]."""
  return jnp.repeat(q.scales[:, i], q.tile[0])[: q.shape[0]]


def pad_contraction(q: QTensor) -> QTensor:
  """`q` with zeros that fill the last tile of its last dimension."""
  return QTensor(pad_with_zeros(q.values, -1, -q.shape[-1] % q.tile[1]), q.scales, q.tile)


def pad_with_zeros(values: jax.Array, dimension: int, count: int) -> jax.Array:
  """`values` with `count` zeros appended along `dimension`."""
  if not count:
    return values
  # As integers, which XLA for CPUs moves several times as fast (jax 0.10.2).
  bits = jax.lax.bitcast_convert_type(values, f"uint{8 * values.itemsize}")
  widths = [(0, 0)] * values.ndim
  widths[dimension] = 0, count
  return jax.lax.bitcast_convert_type(jnp.pad(bits, widths), values.dtype)
