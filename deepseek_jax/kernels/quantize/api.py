"""Quantization to FP8 with online scales: the absmax of each tile becomes 448 (V3 report, section 3.3.2)."""

import jax

from deepseek_jax.kernels.implementations import call_kernel
from deepseek_jax.kernels.qtensor import QTensor


def quantize(
  x: jax.Array, tile: tuple[int, int], *, pow2_scales: bool = False, implementation: str = "auto"
) -> QTensor:
  """`x` [..., rows, columns] in float8_e4m3fn with a scale a `tile`: (1, 128) of activations, (128, 128) of weights.

  pow2_scales: scales are powers of two. A tile with a NaN or an infinity becomes NaN.

  Raises:
    ValueError: an `implementation` that does not exist, or does not support this.
  """
  return call_kernel("quantize", "quantize", implementation, x, tile, pow2_scales)


def quantize_both(
  x: jax.Array, block: int, *, pow2_scales: bool = False, implementation: str = "auto"
) -> tuple[QTensor, QTensor]:
  """(rowwise, columnwise): `x` [rows, columns] and its transpose, each in tiles (1, block), for GEMMs along both.

  `x` is quantized twice: a tile of one copy is not a tile of the other. Raises ValueError as `quantize` does.
  """
  return call_kernel("quantize", "quantize_both", implementation, x, block, pow2_scales)
