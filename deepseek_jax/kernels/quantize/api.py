"""Matrices to FP8 with online scales: each tile's own greatest magnitude becomes 448 (V3 report, section 3.3.2)."""

from deepseek_jax.kernels.implementations import run


def quantize(x, tile, *, pow2_scales=False, implementation="auto"):
  """`x` [..., rows, columns] as a QTensor of e4m3fn with a scale a `tile`: (1, 128) of activations, (128, 128) of weights.

  pow2_scales: scales are powers of two. A tile with a NaN or an infinity becomes NaN.

  Raises:
    ValueError: an `implementation` that does not exist, or does not do this.
  """
  return run("quantize", "quantize", implementation, x, tile, pow2_scales)


def quantize_both(x, block, *, pow2_scales=False, implementation="auto"):
  """(`x`, its transpose) of `x` [rows, columns], each with tiles (1, block): what a product along either dimension reads.

  They are two roundings of `x`: a tile of one is not a tile of the other.
  """
  return run("quantize", "quantize_both", implementation, x, block, pow2_scales)
