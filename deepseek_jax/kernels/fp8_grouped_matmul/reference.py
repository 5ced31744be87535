"""Every group with every row, of which it keeps its own."""

import jax.numpy as jnp

from deepseek_jax.kernels.fp8_matmul import reference as dense
from deepseek_jax.kernels.qtensor import unquantized


def matmul(a, b, group_sizes, step, out_dtype):
  y = jnp.zeros((a.shape[0], b.shape[1]), out_dtype)
  for group, own in enumerate(_rows_of(group_sizes, a.shape[0])):
    y = jnp.where(own[:, None], dense.matmul(a, b[group], out_dtype), y)
  return y


def wgrad(a, b, group_sizes, step, out_dtype):
  wide = [q.dequantized(jnp.result_type(float)) for q in (a, b)]
  own = [[unquantized(jnp.where(rows, x, 0), (1, 1)) for x in wide] for rows in _rows_of(group_sizes, a.shape[1])]
  return jnp.stack([dense.matmul(*operands, out_dtype) for operands in own])


def _rows_of(group_sizes, rows):
  """[groups, rows] bool."""
  ends, row = jnp.cumsum(group_sizes)[:, None], jnp.arange(rows)
  return (row >= ends - group_sizes[:, None]) & (row < ends)
