"""FP8 GEMM with blockwise scales: each block of k is scaled and accumulated in float32 (V3 report, figure 7)."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.kernels.implementations import call_kernel
from deepseek_jax.kernels.qtensor import QTensor


def fp8_matmul(
  a: QTensor, b: QTensor, *, out_dtype: DTypeLike = jnp.float32, implementation: str = "auto"
) -> jax.Array:
  """`a` [m, k] times the transpose of `b` [n, k], both contiguous along k as tensor cores read them: [m, n].

  Args:
    a, b: QTensors whose tiles are equally wide along k, which is the k between promotions: (1, block) of activations
      and gradients, (block, block) of weights. m, n and k are free: last tiles may be partial.

  Raises:
    ValueError: k or its tiles differ, or an `implementation` that does not exist or does not support this.
  """
  check_contraction(a, b)
  return call_kernel("fp8_matmul", "matmul", implementation, a, b, out_dtype)


def check_contraction(a: QTensor, b: QTensor) -> None:
  """Raises ValueError where `a` [.., k] and `b` [.., k] do not contract."""
  if a.shape[-1] != b.shape[-1] or a.tile[1] != b.tile[1]:
    raise ValueError(
      f"operands {a.shape} in tiles {a.tile} and {b.shape} in tiles {b.tile}: the last dimension is contracted, and its "
      "size and tiles must agree; transpose with .T, or quantize along it"
    )
