"""FP8 GEMM for Hopper GPUs: what the dense and the grouped kernels share.

The kernel is persistent: one thread block a multiprocessor takes output tiles until none is left. It is
warp-specialized: one warpgroup copies operands with TMA into a ring buffer of stages, two multiply them with wgmma
(e4m3), each half of the tile's rows. wgmma accumulates in fewer bits than float32 has. So each block of the contraction
starts from zero, is scaled, and is added to the accumulator in float32 registers: it is promoted (V3 report, section
3.3.2).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from deepseek_jax.kernels import _compat
from deepseek_jax.kernels._compat import Ref
from deepseek_jax.kernels.fp8_matmul.xla import pad_with_zeros
from deepseek_jax.kernels.implementations import match_vma
from deepseek_jax.kernels.qtensor import FP8, QTensor
from deepseek_jax.kernels.tiles import BLOCK, MMA_WARPGROUPS, MULTIPROCESSORS, WGMMA_ROWS, TileConfig

COPY_REGISTERS, MMA_REGISTERS = 24, 240  # of a thread, by what its warpgroup does
SWIZZLE = 128  # bytes
# Rows of operands are padded to multiples of these: copies start at multiples of 8 rows, and stores have 64 columns at
# a time, which are rows of b.
ROW_ALIGNMENT, COLUMN_ALIGNMENT = 8, 64


class WorkTile(NamedTuple):
  """The output tile that a cluster computes next: int32 scalars.

  row, column: the first in a and in b. group: of b and of the result, where they have groups. first_block, steps:
  blocks of the contraction. start, end: the group's own rows of a, or its own k of the contraction.
  """

  row: jax.Array
  column: jax.Array
  first_block: jax.Array
  steps: jax.Array
  group: jax.Array | None = None
  start: jax.Array | None = None
  end: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class TileSchedule:
  """The order of output tiles.

  count: (*tables) -> the number of tiles. tile: (i, *tables) -> the i-th. max_tiles: an upper bound of their number.
  """

  count: Callable[..., Any]
  tile: Callable[..., WorkTile]
  max_tiles: int


def smem_transforms(dtype: DTypeLike) -> tuple[Any, Any]:
  """The layout of shared memory that both TMA and wgmma read: 8 rows of 128 bytes, swizzled."""
  return plgpu.TilingTransform((8, SWIZZLE // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(SWIZZLE)


def banded_order(i: jax.Array, down: int | jax.Array, across: int, band: int) -> tuple[jax.Array, jax.Array]:
  """(tile down, tile across) of the i-th of `down` * `across` tiles, in bands of `band` tiles down."""
  band_tiles = band * across
  above = i // band_tiles * band
  height = jnp.minimum(band, down - above)
  within = lax.rem(i, band_tiles)
  return above + lax.rem(within, height), within // height


def prepare_operand(q: QTensor, multiple: int) -> QTensor:
  """`q` as TMA reads it, with zeros up to full blocks of the contraction and a `multiple` of rows.

  Raises:
    Unsupported: this jax is too old.
  """
  _compat.check_mosaic_gpu()
  missing = -q.shape[-2] % multiple
  values = pad_with_zeros(pad_with_zeros(q.values, -1, -q.shape[-1] % BLOCK), -2, missing)
  return QTensor(values, pad_with_zeros(q.scales, -2, missing) if q.tile[0] == 1 else q.scales, q.tile)


def pallas_matmul(
  tables: tuple[jax.Array, ...],
  a: QTensor,
  b: QTensor,
  out: jax.ShapeDtypeStruct,
  schedule: TileSchedule,
  tiles: TileConfig,
  store: "type[FullTileStore] | type[RowRangeStore]",
  masked: bool = False,
) -> jax.Array:
  """Calls the kernel: `a` [m, k] times the transpose of `b` [(groups,) n, k], an array of the type `out`.

  Args:
    tables: int32 arrays that the schedule reads.
    store: how a tile is written.
    masked: values of `a` outside a tile's k [start, end) count as zeros.
  """
  b_has_row_scales = b.tile[0] == 1
  # TMA reads a stage's scales in one piece.
  a_scales, b_scales = a.scales.T, b.scales.T if b_has_row_scales else b.scales
  staging, staging_bytes = store.scratch(tiles, out.dtype)
  stages, m, n = tiles.stages(staging_bytes), tiles.m, tiles.n
  blocks = min(MULTIPROCESSORS // tiles.cluster, schedule.max_tiles)
  ring = functools.partial(plgpu.SMEM, dtype=FP8, transforms=smem_transforms(FP8))
  empty: dict[str, Any] = {"num_arrivals": MMA_WARPGROUPS, "num_barriers": stages}
  scratch = {
    "a_ring": ring((stages, m, BLOCK)),
    "b_ring": ring((stages, n, BLOCK)),
    "scales_a_ring": plgpu.SMEM((stages, m), jnp.float32),
    "scales_b_ring": plgpu.SMEM((stages, n), jnp.float32) if b_has_row_scales else None,
    "staging": staging,
    "full": plgpu.Barrier(num_arrivals=3 + b_has_row_scales, num_barriers=stages),
    "empty": plgpu.ClusterBarrier(collective_axes=("cluster",), **empty)
    if tiles.cluster > 1
    else plgpu.Barrier(**empty),
  }
  cluster: dict[str, Any] = {"cluster": (tiles.cluster,), "cluster_names": ("cluster",)} if tiles.cluster > 1 else {}
  kernel = plgpu.kernel(
    functools.partial(_kernel, len(tables), schedule, tiles, stages, blocks, store.write, masked),
    out_type=out,
    scratch_types=scratch,
    grid=(blocks,),
    grid_names=("block",),
    num_threads=MMA_WARPGROUPS + 1,
    thread_name="warpgroup",
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    **cluster,
  )
  # The call does not type its result as varying over mesh axes.
  return match_vma(kernel(*tables, a.values, a_scales, b.values, b_scales), a.values)[0]


def _kernel(num_tables, schedule, tiles, stages, blocks, write, masked, *refs, full, empty, staging, **rings):
  tables, (a, a_scales, b, b_scales, out) = refs[:num_tables], refs[num_tables:]
  block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
  member = lax.axis_index("cluster") if tiles.cluster > 1 else 0

  def for_each_tile(process):
    """Calls process(tile, steps_done) for each of this block's tiles; returns the steps of all."""

    def body(i, steps_done):
      tile = schedule.tile(block + i * blocks, *tables)
      tile = tile._replace(row=tile.row + member * tiles.m)
      process(tile, steps_done)
      return steps_done + tile.steps

    return lax.fori_loop(0, (schedule.count(*tables) - block + blocks - 1) // blocks, body, jnp.int32(0))

  @pl.when(warpgroup == MMA_WARPGROUPS)
  def producer():
    plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
    copy_operands = functools.partial(_copy_operands, tiles, stages, a, a_scales, b, b_scales, full, empty, rings)
    steps_done = for_each_tile(copy_operands)
    # A block must not end while other warpgroups or blocks may still arrive at its barriers.
    lax.fori_loop(
      jnp.maximum(steps_done - stages, 0), steps_done,
      lambda step, _: plgpu.barrier_wait(empty.at[lax.rem(step, stages)]), None,
    )  # fmt: skip

  @pl.when(warpgroup < MMA_WARPGROUPS)
  def consumer():
    plgpu.set_max_registers(MMA_REGISTERS, action="increase")

    def compute_tile(tile, steps_done):
      sums = _multiply_operands(tiles, stages, warpgroup, tile, steps_done, b_scales, full, empty, rings, masked)
      first_row = tile.row + warpgroup * WGMMA_ROWS * tiles.waves
      write(staging, out, tile, warpgroup, first_row, sums)

    for_each_tile(compute_tile)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _copy_operands(tiles, stages, a, a_scales, b, b_scales, full, empty, rings, tile, steps_done):
  """Copies a tile's operands into the ring, each step as soon as its stage is free."""
  rows, columns = pl.ds(tile.row, tiles.m), pl.ds(tile.column, tiles.n)
  b = b if tile.group is None or len(b.shape) == 2 else b.at[tile.group]
  multicast = {"collective_axes": "cluster"} if tiles.cluster > 1 else {}

  def step(i, _):
    stage, k = lax.rem(steps_done + i, stages), tile.first_block + i
    k_block = pl.ds(k * BLOCK, BLOCK)
    pl.when(steps_done + i >= stages)(lambda: plgpu.barrier_wait(empty.at[stage]))

    def copy(source, ring, **multicast):
      plgpu.copy_gmem_to_smem(source, rings[ring].at[stage], full.at[stage], **multicast)

    copy(a.at[rows, k_block], "a_ring")
    copy(b.at[columns, k_block], "b_ring", **multicast)
    copy(a_scales.at[k, rows], "scales_a_ring")
    if rings["scales_b_ring"] is not None:
      copy(b_scales.at[k, columns], "scales_b_ring", **multicast)

  lax.fori_loop(0, tile.steps, step, None)


def _multiply_operands(tiles, stages, warpgroup, tile, steps_done, b_scales, full, empty, rings, masked):
  """The warpgroup's rows of a tile, float32: for each wgmma tile a list of column pieces [WGMMA_ROWS, width]."""
  row_slices = [pl.ds((warpgroup * tiles.waves + wave) * WGMMA_ROWS, WGMMA_ROWS) for wave in range(tiles.waves)]
  b_row_scales = rings["scales_b_ring"]
  # The columns of a piece lie in one block of b, and so have one scale.
  width = tiles.n if b_row_scales is not None else math.gcd(tiles.n, BLOCK)
  pieces = range(0, tiles.n, width)

  def step(i, sums):
    stage, k = lax.rem(steps_done + i, stages), tile.first_block + i
    plgpu.barrier_wait(full.at[stage])
    if masked:
      pl.when((k * BLOCK < tile.start) | ((k + 1) * BLOCK > tile.end))(
        lambda: _zero_outside(rings["a_ring"].at[stage], row_slices, tile.start - k * BLOCK, tile.end - k * BLOCK)
      )
    if b_row_scales is None:
      group_index = () if len(b_scales.shape) == 2 else (tile.group,)
      last_block = b_scales.shape[-2] - 1  # a tile may extend beyond b
      scales = [b_scales[*group_index, jnp.minimum((tile.column + piece) // BLOCK, last_block), k] for piece in pieces]
    new_sums = []
    for wave, rows in enumerate(row_slices):

      def multiply(accumulator, rows=rows, last=wave == tiles.waves - 1):
        plgpu.wgmma(accumulator, rings["a_ring"].at[stage, rows], rings["b_ring"].at[stage].T)
        # Loads while wgmma runs. The next copy to this stage is the async proxy's; the commit orders it after these
        # loads.
        row_scale = _compat.load_smem(rings["scales_a_ring"].at[stage, rows], plgpu.Layout.WGMMA.reduce(1))
        column_scale = None
        if b_row_scales is not None:
          column_scale = _compat.load_smem(b_row_scales.at[stage], plgpu.Layout.WGMMA.reduce(0))
        if last:
          plgpu.commit_smem()
        return accumulator[...], row_scale, column_scale

      product, row_scale, column_scale = pl.run_scoped(multiply, plgpu.ACC((WGMMA_ROWS, tiles.n), jnp.float32))
      if wave == tiles.waves - 1:
        plgpu.barrier_arrive(empty.at[stage])
      if b_row_scales is None:
        new_sums.append([
          total + product[:, piece : piece + width] * lax.broadcast_in_dim(row_scale * scale, total.shape, (0,))
          for piece, scale, total in zip(pieces, scales, sums[wave], strict=True)
        ])  # fmt: skip
      else:
        row_scale, column_scale = (
          lax.broadcast_in_dim(x, product.shape, (i,)) for i, x in enumerate((row_scale, column_scale))
        )
        new_sums.append([sums[wave][0] + product * column_scale * row_scale])
    return new_sums

  zeros = [
    [plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, width), jnp.float32), plgpu.Layout.WGMMA) for _ in pieces]
    for _ in row_slices
  ]
  return lax.fori_loop(0, tile.steps, step, zeros)


def _zero_outside(values, row_slices, start, end):
  """Zeroes `values` [rows, BLOCK] outside columns [start, end)."""
  for rows in row_slices:
    x = _compat.load_smem(values.at[rows], plgpu.Layout.WGMMA_8BIT)
    column = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=plgpu.Layout.WGMMA_8BIT)
    mask = jnp.where((column >= start) & (column < end), -1, 0).astype(jnp.int8)
    bits = lax.bitcast_convert_type(x, jnp.int8)  # of 8-bit types only bitwise operations exist
    values[rows] = lax.bitcast_convert_type(bits & mask, x.dtype)
  plgpu.commit_smem()


def _store_rows(staging, out, row, column, pieces):
  """Stores WGMMA_ROWS rows, `pieces` of columns, to `out` from (row, column) on.

  TMA leaves out what lies outside `out`.
  """
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the store before has read `staging`
  width = pieces[0].shape[1]
  for i, piece in enumerate(pieces):
    staging[:, i * width : (i + 1) * width] = piece.astype(staging.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(staging, out.at[pl.ds(row, WGMMA_ROWS), pl.ds(column, staging.shape[1])])


class FullTileStore:
  """Stores tiles all of whose rows belong to the tile, but for those outside the result."""

  @staticmethod
  def scratch(tiles: TileConfig, dtype: DTypeLike) -> tuple[Any, int]:
    """(shared memory in which `write` stages rows, its bytes)."""
    shape = MMA_WARPGROUPS, WGMMA_ROWS, tiles.n
    return plgpu.SMEM(shape, dtype, transforms=smem_transforms(dtype)), math.prod(shape) * jnp.dtype(dtype).itemsize

  @staticmethod
  def write(
    staging: Ref, out: Ref, tile: WorkTile, warpgroup: jax.Array, first_row: jax.Array, sums: list[list[jax.Array]]
  ) -> None:
    """Writes `sums`, this warpgroup's rows of `tile`, to `out` from `first_row` on."""
    out = out if len(out.shape) == 2 else out.at[tile.group]
    for wave, pieces in enumerate(sums):
      _store_rows(staging.at[warpgroup], out, first_row + wave * WGMMA_ROWS, tile.column, pieces)


class RowRangeStore:
  """Stores rows [start, end) of tiles, and no others: these are another group's."""

  @staticmethod
  def scratch(tiles: TileConfig, dtype: DTypeLike) -> tuple[Any, int]:
    """As `FullTileStore.scratch`, with a second buffer for single rows."""
    full, full_bytes = FullTileStore.scratch(tiles, dtype)
    partial = plgpu.SMEM((MMA_WARPGROUPS, WGMMA_ROWS, SWIZZLE // jnp.dtype(dtype).itemsize), dtype)
    return (full, partial), full_bytes + MMA_WARPGROUPS * WGMMA_ROWS * SWIZZLE

  @staticmethod
  def write(
    staging: tuple[Ref, Ref],
    out: Ref,
    tile: WorkTile,
    warpgroup: jax.Array,
    first_row: jax.Array,
    sums: list[list[jax.Array]],
  ) -> None:
    """As `FullTileStore.write`, only of the rows in [start, end)."""
    assert tile.start is not None and tile.end is not None  # as tiles of groups have them
    full, partial = (x.at[warpgroup] for x in staging)
    for wave, pieces in enumerate(sums):
      row = first_row + wave * WGMMA_ROWS
      inside = (tile.start <= row) & (row + WGMMA_ROWS <= tile.end)
      pl.when(inside)(functools.partial(_store_rows, full, out, row, tile.column, pieces))
      low, high = (jnp.clip(limit - row, 0, WGMMA_ROWS) for limit in (tile.start, tile.end))
      overlaps = ~inside & (high > low)
      pl.when(overlaps)(functools.partial(_store_some_rows, partial, out, row, low, high - low, tile.column, pieces))


def _store_some_rows(staging, out, row, low, count, column, pieces):
  """Stores `count` < WGMMA_ROWS rows from `low` on.

  Copies have fixed shapes: rows are copied by the bits of `count`.
  """
  (_, chunk), width = staging.shape, pieces[0].shape[1]
  for i, piece in enumerate(pieces):
    for offset in range(0, width, chunk):
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      _compat.store_smem(staging, piece[:, offset : offset + chunk].astype(staging.dtype))
      plgpu.commit_smem()
      columns, start = pl.ds(column + i * width + offset, chunk), low
      for rows in (32, 16, 8, 4, 2, 1):

        @pl.when(count & rows != 0)
        def copy(start=start, rows=rows, columns=columns):
          plgpu.copy_smem_to_gmem(staging.at[pl.ds(start, rows)], out.at[pl.ds(row + start, rows), columns])

        start += count & rows
