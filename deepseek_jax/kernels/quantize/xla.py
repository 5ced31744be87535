"""Quantizes all tiles at once. `x` is padded to full tiles with zeros, which raise no absmax."""

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.qtensor import FP8, QTensor, compute_absmax, compute_scales, tile_counts


def quantize(x: jax.Array, tile: tuple[int, int], pow2_scales: bool) -> QTensor:
  (down, across), (rows, columns) = tile_counts(x.shape, tile), tile
  leading, shape = x.shape[:-2], x.shape[-2:]
  padding = down * rows - shape[0], across * columns - shape[1]
  padded = jnp.pad(x.astype(jnp.float32), [(0, 0)] * len(leading) + [(0, n) for n in padding])
  tiles = padded.reshape(*leading, down, rows, across, columns)
  scales = compute_scales(compute_absmax(tiles, (-3, -1)), pow2_scales)  # [..., down, across]
  values = (tiles / scales[..., :, None, :, None]).astype(FP8).reshape(padded.shape)
  return QTensor(values[..., : shape[0], : shape[1]], scales, tile)


def quantize_both(x: jax.Array, block: int, pow2_scales: bool) -> tuple[QTensor, QTensor]:
  rowwise = quantize(x, (1, block), pow2_scales)
  # Transposed after quantization, so that FP8 values move and not floats.
  columnwise = quantize(x, (block, 1), pow2_scales).T
  return rowwise, columnwise
