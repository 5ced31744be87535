"""FP8 grouped GEMMs with blockwise scales: the experts of an MoE layer, forward and backward."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.kernels.fp8_matmul.api import check_contraction
from deepseek_jax.kernels.implementations import call_kernel
from deepseek_jax.kernels.qtensor import QTensor


def fp8_grouped_matmul(
  a: QTensor,
  b: QTensor,
  group_sizes: jax.Array,
  *,
  step: int = 128,
  out_dtype: DTypeLike = jnp.float32,
  implementation: str = "auto",
) -> jax.Array:
  """Rows of `a` [rows, k] times the transpose of their group's matrix in `b` [groups, n, k]: [rows, n].

  Forward and dgrad.

  Args:
    group_sizes: [groups] int32, any sizes, also zero. Rows past their sum belong to no group and come out zero.
    step: rows multiplied at a time, with one group's matrix: no more than a usual group has.

  Raises:
    ValueError: k or its tiles differ, or an `implementation` that does not exist or does not support this.
  """
  check_contraction(a, b)
  return call_kernel("fp8_grouped_matmul", "matmul", implementation, a, b, group_sizes, step, out_dtype)


def fp8_grouped_wgrad(
  a: QTensor,
  b: QTensor,
  group_sizes: jax.Array,
  *,
  step: int = 128,
  out_dtype: DTypeLike = jnp.float32,
  implementation: str = "auto",
) -> jax.Array:
  """The contraction of `a` [m, rows] and `b` [n, rows] over each group's own rows: [groups, m, n]. Wgrad.

  Tiles are along rows and do not follow groups. A tile at a border has rows of two groups, which share its scale, and a
  NaN.

  Args:
    group_sizes: as in `fp8_grouped_matmul`.
    step: rows at a time; it divides a tile.

  Raises:
    ValueError: `step` does not divide a tile, and as in `fp8_grouped_matmul`.
  """
  check_contraction(a, b)
  if a.tile[1] % step:
    raise ValueError(f"step={step} does not divide tiles of {a.tile[1]} rows: use a divisor")
  return call_kernel("fp8_grouped_matmul", "wgrad", implementation, a, b, group_sizes, step, out_dtype)
