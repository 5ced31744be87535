"""Each element divided by the scale that it has, without padding."""

import jax.numpy as jnp

from deepseek_jax.kernels.qtensor import FP8, QTensor, greatest_of, scales_of, tiles_of


def quantize(x, tile, pow2_scales):
  x, (down, across), (rows, columns) = x.astype(jnp.float32), tiles_of(x.shape, tile), tile
  greatest = jnp.stack([greatest_of(x[..., j * columns : (j + 1) * columns], -1) for j in range(across)], -1)
  if rows > 1:
    greatest = jnp.stack([greatest_of(greatest[..., i * rows : (i + 1) * rows, :], -2) for i in range(down)], -2)
  scaled = QTensor(x, scales_of(greatest, pow2_scales), tile)
  return QTensor((x / scaled.scales_of_elements()).astype(FP8), scaled.scales, tile)


def quantize_both(x, block, pow2_scales):
  return quantize(x, (1, block), pow2_scales), quantize(x.mT, (1, block), pow2_scales)
