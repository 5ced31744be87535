"""Products of tiled eight-bit matrices by groups of rows: the experts of a mixture, forward and backward."""

import jax.numpy as jnp

from deepseek_jax.kernels.fp8_matmul.api import check_contraction
from deepseek_jax.kernels.implementations import run


def fp8_grouped_matmul(a, b, group_sizes, *, step=128, out_dtype=jnp.float32, implementation="auto"):
  """Rows of `a` [rows, k] times the transpose of their group's matrix in `b` [groups, n, k]: [rows, n]. Forward and dgrad.

  Args:
    group_sizes: [groups] int32, any sizes, also zero. Rows past their sum belong to none and come out zero.
    step: rows multiplied at a time, with one group's matrix: no more than a usual group has.
  """
  check_contraction(a, b)
  return run("fp8_grouped_matmul", "matmul", implementation, a, b, group_sizes, step, out_dtype)


def fp8_grouped_wgrad(a, b, group_sizes, *, step=128, out_dtype=jnp.float32, implementation="auto"):
  """Of each group the product of its part of the contraction: `a` [m, rows], `b` [n, rows] -> [groups, m, n]. Wgrad.

  Tiles lie over rows, whatever the groups: at a border they share a scale, and a NaN.

  Args:
    step: rows at a time, of which a tile has a multiple.

  Raises:
    ValueError: `step` does not divide a tile, and as in `fp8_grouped_matmul`.
  """
  check_contraction(a, b)
  if a.tile[1] % step:
    raise ValueError(f"step={step} does not divide tiles of {a.tile[1]} rows: use a divisor")
  return run("fp8_grouped_matmul", "wgrad", implementation, a, b, group_sizes, step, out_dtype)
