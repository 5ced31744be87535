"""Divides each element by its tile's scale, without padding."""

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.qtensor import FP8, QTensor, compute_absmax, compute_scales, tile_counts


def quantize(x: jax.Array, tile: tuple[int, int], pow2_scales: bool) -> QTensor:
  x, (down, across), (rows, columns) = x.astype(jnp.float32), tile_counts(x.shape, tile), tile
  absmax = jnp.stack([compute_absmax(x[..., j * columns : (j + 1) * columns], -1) for j in range(across)], -1)
  if rows > 1:
    absmax = jnp.stack([compute_absmax(absmax[..., i * rows : (i + 1) * rows, :], -2) for i in range(down)], -2)
  scaled = QTensor(x, compute_scales(absmax, pow2_scales), tile)
  return QTensor((x / scaled.broadcast_scales()).astype(FP8), scaled.scales, tile)


def quantize_both(x: jax.Array, block: int, pow2_scales: bool) -> tuple[QTensor, QTensor]:
  return quantize(x, (1, block), pow2_scales), quantize(x.mT, (1, block), pow2_scales)
