"""The GEMM of kernels/hopper.py for two matrices, with output tiles in bands."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.kernels import hopper
from deepseek_jax.kernels.implementations import match_vma
from deepseek_jax.kernels.qtensor import QTensor
from deepseek_jax.kernels.tiles import TileConfig, select_tile_config


def matmul(a: QTensor, b: QTensor, out_dtype: DTypeLike, tiles: TileConfig | None = None) -> jax.Array:
  (m, k), n = a.shape, b.shape[0]
  a = hopper.prepare_operand(a, hopper.ROW_ALIGNMENT)
  b = hopper.prepare_operand(b, hopper.COLUMN_ALIGNMENT)
  a, b = match_vma(a, b)
  tiles = tiles or select_tile_config("fp8_wgrad" if b.tile[0] == 1 else "fp8_matmul", out_dtype, m, n, k)
  cluster_rows, columns = tiles.m * tiles.cluster, tiles.n
  down, across, steps, band = -(-m // cluster_rows), -(-n // columns), a.scales.shape[1], tiles.band

  def tile(i):
    row, column = hopper.banded_order(i, down, across, band)
    return hopper.WorkTile(row * cluster_rows, column * columns, jnp.int32(0), jnp.int32(steps))

  schedule = hopper.TileSchedule(lambda: down * across, tile, down * across)
  out = jax.ShapeDtypeStruct((a.shape[0], b.shape[0]), out_dtype)
  return hopper.pallas_matmul((), a, b, out, schedule, tiles, hopper.FullTileStore)[:m, :n]
