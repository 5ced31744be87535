"""Products of tiled eight-bit matrices: each 128 of the contraction is scaled and added up in float32 (V3 report, figure 7)."""

import jax.numpy as jnp

from deepseek_jax.kernels.implementations import run


def fp8_matmul(a, b, *, out_dtype=jnp.float32, implementation="auto"):
  """`a` [m, k] times the transpose of `b` [n, k], both contiguous along k as tensor cores read them: [m, n].

  Args:
    a, b: QTensors whose tiles are as wide along k, the number of terms between promotions: (1, block) of activations and
      gradients, (block, block) of weights. m, n and k are free: what a last tile lacks counts as zeros.

  Raises:
    ValueError: k or its tiles differ, or an `implementation` that does not exist or does not do this.
  """
  check_contraction(a, b)
  return run("fp8_matmul", "matmul", implementation, a, b, out_dtype)


def check_contraction(a, b):
  """Raises ValueError where `a` [.., k] and `b` [.., k] do not contract."""
  if a.shape[-1] != b.shape[-1] or a.tile[1] != b.tile[1]:
    raise ValueError(
      f"operands {a.shape} in tiles {a.tile} and {b.shape} in tiles {b.tile}: the last dimension is contracted, and its "
      "size and tiles are to agree; transpose with .T, or quantise along it"
    )
