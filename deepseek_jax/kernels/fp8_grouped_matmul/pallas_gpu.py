"""The GEMM of kernels/hopper.py by group: tiles of each group's rows, or of each group's own result."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.kernels import hopper
from deepseek_jax.kernels.implementations import match_vma
from deepseek_jax.kernels.qtensor import QTensor
from deepseek_jax.kernels.tiles import BLOCK, TileConfig, select_tile_config


def matmul(
  a: QTensor, b: QTensor, group_sizes: jax.Array, step: int, out_dtype: DTypeLike, tiles: TileConfig | None = None
) -> jax.Array:
  (m, k), (groups, n, _) = a.shape, b.shape
  a = hopper.prepare_operand(a, hopper.ROW_ALIGNMENT)
  b = hopper.prepare_operand(b, hopper.COLUMN_ALIGNMENT)
  a, b, group_sizes = match_vma(a, b, group_sizes)
  tiles = tiles or select_tile_config("fp8_grouped_matmul", out_dtype, m, n, k, groups)
  columns, band = tiles.n, tiles.band
  count, row_tiles = _group_row_tiles(group_sizes, m, tiles.m * tiles.cluster)
  across = -(-n // columns)

  def tile(i, count, row_tiles):
    row_tile, column = hopper.banded_order(i, count[0], across, band)
    group, row, start, end = (row_tiles[field, row_tile] for field in range(4))
    steps = jnp.where(group < groups, a.scales.shape[1], 0)
    return hopper.WorkTile(row, column * columns, jnp.int32(0), steps, group, start, end)

  schedule = hopper.TileSchedule(lambda count, row_tiles: count[0] * across, tile, row_tiles.shape[1] * across)
  out = jax.ShapeDtypeStruct((a.shape[0], b.shape[1]), out_dtype)
  return hopper.pallas_matmul((count, row_tiles), a, b, out, schedule, tiles, hopper.RowRangeStore)[:m, :n]


def wgrad(
  a: QTensor, b: QTensor, group_sizes: jax.Array, step: int, out_dtype: DTypeLike, tiles: TileConfig | None = None
) -> jax.Array:
  (m, k), n, groups = a.shape, b.shape[0], group_sizes.size
  a = hopper.prepare_operand(a, hopper.ROW_ALIGNMENT)
  b = hopper.prepare_operand(b, hopper.COLUMN_ALIGNMENT)
  a, b, group_sizes = match_vma(a, b, group_sizes)
  tiles = tiles or select_tile_config("fp8_grouped_wgrad", out_dtype, groups * m, n, k, groups)
  cluster_rows, columns, band = tiles.m * tiles.cluster, tiles.n, tiles.band
  down, across = -(-m // cluster_rows), -(-n // columns)
  ends = jnp.cumsum(group_sizes)

  def tile(i, starts, ends):
    group = i // (down * across)
    row, column = hopper.banded_order(jax.lax.rem(i, down * across), down, across, band)
    start, end = starts[group], ends[group]
    first_block = start // BLOCK
    steps = jnp.where(end > start, (end + BLOCK - 1) // BLOCK - first_block, 0)
    return hopper.WorkTile(row * cluster_rows, column * columns, first_block, steps, group, start, end)

  count = groups * down * across
  schedule = hopper.TileSchedule(lambda *_: count, tile, count)
  out = jax.ShapeDtypeStruct((groups, a.shape[0], b.shape[0]), out_dtype)
  store = hopper.FullTileStore
  return hopper.pallas_matmul((ends - group_sizes, ends), a, b, out, schedule, tiles, store, masked=True)[:, :m, :n]


def _group_row_tiles(group_sizes, rows, tile):
  """Tiles of `tile` rows, each of one group.

  Rows of no group are those of one more group. Tiles start at multiples of ROW_ALIGNMENT, so that they may overlap.

  Returns count [1] int32 and table [4, n] int32, n >= count: group, first row, group start, group end.
  """
  sizes = jnp.append(group_sizes, rows - group_sizes.sum())
  ends = jnp.cumsum(sizes)
  starts = ends - sizes
  first = starts // hopper.ROW_ALIGNMENT * hopper.ROW_ALIGNMENT
  counts = jnp.where(sizes > 0, -(-(ends - first) // tile), 0)
  count_ends = jnp.cumsum(counts)
  i = jnp.arange((rows + (hopper.ROW_ALIGNMENT - 1) * sizes.size) // tile + sizes.size)
  group = jnp.minimum(jnp.searchsorted(count_ends, i, side="right", method="compare_all"), sizes.size - 1)
  row = first[group] + (i - (count_ends - counts)[group]) * tile
  return count_ends[-1:].astype(jnp.int32), jnp.stack([group, row, starts[group], ends[group]]).astype(jnp.int32)
