"""Multiplies every group with every row, and selects each group's own rows."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.kernels.fp8_matmul import reference as dense
from deepseek_jax.kernels.qtensor import QTensor, with_unit_scales


def matmul(a: QTensor, b: QTensor, group_sizes: jax.Array, step: int, out_dtype: DTypeLike) -> jax.Array:
  y = jnp.zeros((a.shape[0], b.shape[1]), out_dtype)
  for group, mask in enumerate(_group_row_masks(group_sizes, a.shape[0])):
    y = jnp.where(mask[:, None], dense.matmul(a, b[group], out_dtype), y)
  return y


def wgrad(a: QTensor, b: QTensor, group_sizes: jax.Array, step: int, out_dtype: DTypeLike) -> jax.Array:
  dequantized = [q.dequantize(jnp.result_type(float)) for q in (a, b)]
  masks = _group_row_masks(group_sizes, a.shape[1])
  group_operands = [[with_unit_scales(jnp.where(mask, x, 0), (1, 1)) for x in dequantized] for mask in masks]
  return jnp.stack([dense.matmul(lhs, rhs, out_dtype) for lhs, rhs in group_operands])


def _group_row_masks(group_sizes, rows):
  """[groups, rows] bool: which rows are the group's."""
  ends, row = jnp.cumsum(group_sizes)[:, None], jnp.arange(rows)
  return (row >= ends - group_sizes[:, None]) & (row < ends)
