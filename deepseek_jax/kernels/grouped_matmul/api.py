"""Grouped matmul: rows sorted by group times their group's own matrix, as the experts of an MoE layer need it."""

import jax

from deepseek_jax.kernels.implementations import call_kernel


def block_rows(rows: int, groups: int) -> int:
  """Rows of a block for `rows` in all: about half a mean group, since each group is padded to a multiple of it."""
  mean = max(rows // groups, 1)
  if mean == 1:
    return 8
  return min(max(1 << (mean.bit_length() - 2), 8), 128)


def grouped_matmul(
  x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, block: int, implementation: str = "auto"
) -> jax.Array:
  """`x` [rows, k] times `w` [groups, k, n], by group: [rows, n] in the dtype of `x`, accumulated in at least float32.

  Args:
    x: rows sorted by group; those past sum(group_sizes) belong to none and come out zero. rows is a multiple of
      `block`.
    group_sizes: [groups] int32, each a multiple of `block`.
    implementation: as in `call_kernel`; "pallas_tpu" is jax's megablox, "pallas_gpu" its ragged_dot for Hopper.

  Raises:
    ValueError: rows is not a multiple of `block`, or an `implementation` that does not exist or does not support this.
  """
  if x.shape[0] % block:
    raise ValueError(f"x has {x.shape[0]} rows, which is not a multiple of block={block}: pad it")
  return call_kernel("grouped_matmul", "grouped_matmul", implementation, x, w, group_sizes, block)
