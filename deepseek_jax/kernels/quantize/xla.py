"""All tiles at once, of `x` padded to whole tiles with zeros, which raise no scale."""

import jax.numpy as jnp

from deepseek_jax.kernels.qtensor import FP8, QTensor, greatest_of, scales_of, tiles_of


def quantize(x, tile, pow2_scales):
  (down, across), (rows, columns) = tiles_of(x.shape, tile), tile
  leading, shape = x.shape[:-2], x.shape[-2:]
  missing = down * rows - shape[0], across * columns - shape[1]
  padded = jnp.pad(x.astype(jnp.float32), [(0, 0)] * len(leading) + [(0, n) for n in missing])
  tiles = padded.reshape(*leading, down, rows, across, columns)
  scales = scales_of(greatest_of(tiles, (-3, -1)), pow2_scales)  # [..., down, across]
  values = (tiles / scales[..., :, None, :, None]).astype(FP8).reshape(padded.shape)
  return QTensor(values[..., : shape[0], : shape[1]], scales, tile)


def quantize_both(x, block, pow2_scales):
  return quantize(x, (1, block), pow2_scales), quantize(
    x, (block, 1), pow2_scales
  ).T  # bytes are transposed, not floats
