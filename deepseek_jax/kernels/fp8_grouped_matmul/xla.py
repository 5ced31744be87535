"""A loop over the pairs of a group and a block of `step` rows in which it has some."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.kernels.fp8_matmul.xla import (
  blockwise_matmul,
  pad_contraction,
  pad_with_zeros,
  row_scales,
  unscaled_matmul,
)
from deepseek_jax.kernels.implementations import match_vma
from deepseek_jax.kernels.qtensor import QTensor


def matmul(a: QTensor, b: QTensor, group_sizes: jax.Array, step: int, out_dtype: DTypeLike) -> jax.Array:
  a, b, rows = pad_contraction(a), pad_contraction(b), a.shape[0]
  # Each row has scales of its own.
  values, scales = (pad_with_zeros(x, 0, -rows % step) for x in (a.values, a.scales))
  count, group_block = _group_blocks(group_sizes, step)

  def body(i, y):
    group, start, mask = group_block(i)
    block_values, block_scales = (jax.lax.dynamic_slice_in_dim(x, start, step) for x in (values, scales))
    new = blockwise_matmul(QTensor(block_values, block_scales, a.tile), b[group]).astype(out_dtype)
    old = jax.lax.dynamic_slice_in_dim(y, start, step)
    return jax.lax.dynamic_update_slice_in_dim(y, jnp.where(mask[:, None], new, old), start, 0)

  zeros = jnp.zeros((values.shape[0], b.shape[1]), out_dtype)
  return jax.lax.fori_loop(0, count, body, match_vma(zeros, a, b, group_sizes)[0])[:rows]


def wgrad(a: QTensor, b: QTensor, group_sizes: jax.Array, step: int, out_dtype: DTypeLike) -> jax.Array:
  values = [pad_with_zeros(q.values, 1, -a.shape[1] % step) for q in (a, b)]
  count, group_block = _group_blocks(group_sizes, step)

  def body(i, dw):
    group, start, mask = group_block(i)
    tile = start // a.tile[1]
    # Masks both operands, since zero times NaN is NaN.
    lhs, rhs = (jnp.where(mask, jax.lax.dynamic_slice_in_dim(x, start, step, 1), 0) for x in values)
    product = unscaled_matmul(lhs, rhs) * row_scales(a, tile)[:, None] * row_scales(b, tile)
    return dw.at[group].add(product)  # in place

  zeros = jnp.zeros((group_sizes.size, a.shape[0], b.shape[0]))
  return jax.lax.fori_loop(0, count, body, match_vma(zeros, a, b, group_sizes)[0]).astype(out_dtype)


def _group_blocks(group_sizes, step):
  """(number of pairs, i -> (group, first of the `step` rows, which of them are the group's [step] bool))."""
  ends = jnp.cumsum(group_sizes)
  starts = ends - group_sizes
  first_block = starts // step
  counts = jnp.where(group_sizes > 0, -(-ends // step) - first_block, 0)
  count_ends = jnp.cumsum(counts)

  def group_block(i):
    group = jnp.searchsorted(count_ends, i, side="right")
    start = (first_block[group] + i - (count_ends[group] - counts[group])) * step
    row = start + jnp.arange(step)
    return group, start, (row >= starts[group]) & (row < ends[group])

  return count_ends[-1], group_block
