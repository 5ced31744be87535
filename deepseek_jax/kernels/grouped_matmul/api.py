"""Products of rows, sorted by group, with their group's own matrix: the arithmetic of a mixture of experts."""

from deepseek_jax.kernels.grouped_matmul.xla import has_ragged_dot
from deepseek_jax.kernels.implementations import device_kind, run


def block_rows(rows: int, groups: int) -> int:
  """Rows of a block for `rows` in all: about half a mean group, since each group is padded to whole blocks."""
  mean = max(rows // groups, 1)
  return min(max(1 << (mean.bit_length() - 2) if mean > 1 else 1, 8), 128)


def grouped_matmul(x, w, group_sizes, *, block, implementation="auto"):
  """`x` [rows, k] times `w` [groups, k, n], by group: [rows, n] in the dtype of `x`, accumulated in at least float32.

  Args:
    x: rows sorted by group; those past sum(group_sizes) belong to none and come out zero. rows is a multiple of `block`.
    group_sizes: [groups] int32, each a multiple of `block`.
    implementation: as in `implementations.run`; "pallas_tpu" is jax's megablox, "pallas_gpu" its ragged_dot for Hopper.

  Raises:
    ValueError: rows is not a multiple of `block`, or an `implementation` that does not exist or does not do this.
  """
  if x.shape[0] % block:
    raise ValueError(f"x has {x.shape[0]} rows, which is not a multiple of block={block}: pad it")
  if implementation == "auto" and has_ragged_dot(device_kind()):
    implementation = "xla"
  return run("grouped_matmul", "grouped_matmul", implementation, x, w, group_sizes, block)
