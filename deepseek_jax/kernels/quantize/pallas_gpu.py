"""Quantization on Hopper GPUs: each thread block reads a tile of 128 x 128 into shared memory once, for both copies."""

import jax

from deepseek_jax.kernels import hopper_quantize
from deepseek_jax.kernels.qtensor import QTensor


def quantize(x: jax.Array, tile: tuple[int, int], pow2_scales: bool) -> QTensor:
  return hopper_quantize.quantize_tiles(x, tile, pow2_scales)


def quantize_both(x: jax.Array, block: int, pow2_scales: bool) -> tuple[QTensor, QTensor]:
  return hopper_quantize.apply_and_quantize_both_hopper(lambda x: x, [x], block, pow2_scales)
