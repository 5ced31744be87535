"""A product of tiled eight-bit matrices for Hopper GPUs: what the dense and the grouped kernels share.

One thread block a multiprocessor takes tiles of the result until none is left. A warpgroup copies operands (TMA) into a ring
of stages; two warpgroups multiply them (wgmma, e4m3), each half of the tile's rows. wgmma adds up in fewer bits than float32
has, so each `block` of the contraction starts from zero and is scaled and added in registers (V3 report, section 3.3.2).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepseek_jax.kernels import _compat
from deepseek_jax.kernels.fp8_matmul.xla import padded
from deepseek_jax.kernels.implementations import Unsupported, vary
from deepseek_jax.kernels.qtensor import FP8, QTensor
from deepseek_jax.kernels.tiles import BLOCK, MULTIPROCESSORS, WARPGROUPS, WAVE

COPYING, MULTIPLYING = 24, 240  # registers of a thread
SWIZZLE = 128  # bytes
# Of operands' rows: copies start at multiples of 8 rows, and stores have 64 columns at a time, rows of b being columns.
ROWS, COLUMNS = 8, 64


class Tile(NamedTuple):
  """What a cluster does next: int32 scalars.

  row, column: the first in a and in b. group: of b and of the result, where they have groups. first, steps: blocks of the
  contraction. start, end: the group's own rows of a, or terms of the contraction.
  """

  row: jax.Array
  column: jax.Array
  first: jax.Array
  steps: jax.Array
  group: jax.Array | None = None
  start: jax.Array | None = None
  end: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Schedule:
  """count(*tables): the number of tiles; tile(i, *tables): the i-th. most: no less than the number of tiles."""

  count: Callable
  tile: Callable
  most: int


def transforms(dtype):
  """Of shared memory that TMA and wgmma read alike: 8 rows of 128 bytes, swizzled."""
  return plgpu.TilingTransform((8, SWIZZLE // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(SWIZZLE)


def banded(i, down, across, band):
  """(tile down, tile across) of the i-th of `down` * `across` tiles, in bands of `band` down."""
  of_band = band * across
  above = i // of_band * band
  height = jnp.minimum(band, down - above)
  within = lax.rem(i, of_band)
  return above + lax.rem(within, height), within // height


def operand(q, name, multiple, heights=(1,)):
  """`q` as TMA reads it, with zeros up to whole blocks of the contraction and a `multiple` of rows.

  Raises:
    Unsupported: its tiles are not of `heights` rows by BLOCK, or it is not in FP8.
  """
  _compat.check_mosaic_gpu()
  if q.values.dtype != FP8 or q.tile[1] != BLOCK or q.tile[0] not in heights or not q.values.size:
    raise Unsupported(
      f"{name}: kernels for Hopper multiply {jnp.dtype(FP8)} in tiles of {' or '.join(map(str, heights))} x {BLOCK}, and this is "
      f"{q.values.dtype} {q.shape} in tiles of {q.tile[0]} x {q.tile[1]}"
    )
  missing = -q.shape[-2] % multiple
  values = padded(padded(q.values, -1, -q.shape[-1] % BLOCK), -2, missing)
  return QTensor(values, padded(q.scales, -2, missing) if q.tile[0] == 1 else q.scales, q.tile)


def result(shape, dtype):
  """The type of a product.

  Raises:
    Unsupported: the dtype is none that is stored.
  """
  if dtype not in (jnp.float32, jnp.bfloat16):
    raise Unsupported(f"Hopper kernels make float32 and bfloat16, not {jnp.dtype(dtype)}")
  return jax.ShapeDtypeStruct(shape, dtype)


def product(tables, a, b, out, schedule, tiles, store, masked=False):
  """The kernel's call: `out` (shape and dtype) from `a` [m, k] and the transpose of `b` [(groups,) n, k], QTensors.

  Args:
    tables: int32 arrays that the schedule reads.
    store: which of STORES writes a tile.
    masked: values of `a` outside a tile's terms [start, end) count as zeros.
  """
  of_rows = b.tile[0] == 1
  # TMA reads a stage's scales in one piece.
  scales_a, scales_b = a.scales.T, b.scales.T if of_rows else b.scales
  staging, staging_bytes = STORES[store].scratch(tiles, out.dtype)
  stages, m, n = tiles.stages(staging_bytes), tiles.m, tiles.n
  blocks = min(MULTIPROCESSORS // tiles.cluster, schedule.most)
  ring = functools.partial(plgpu.SMEM, dtype=FP8, transforms=transforms(FP8))
  empty = {"num_arrivals": WARPGROUPS, "num_barriers": stages}
  scratch = {
    "a_ring": ring((stages, m, BLOCK)),
    "b_ring": ring((stages, n, BLOCK)),
    "scales_a_ring": plgpu.SMEM((stages, m), jnp.float32),
    "scales_b_ring": plgpu.SMEM((stages, n), jnp.float32) if of_rows else None,
    "staging": staging,
    "full": plgpu.Barrier(num_arrivals=3 + of_rows, num_barriers=stages),
    "empty": plgpu.ClusterBarrier(collective_axes=("cluster",), **empty)
    if tiles.cluster > 1
    else plgpu.Barrier(**empty),
  }
  cluster = {"cluster": (tiles.cluster,), "cluster_names": ("cluster",)} if tiles.cluster > 1 else {}
  kernel = plgpu.kernel(
    functools.partial(_kernel, len(tables), schedule, tiles, stages, blocks, STORES[store].write, masked),
    out_type=out,
    scratch_types=scratch,
    grid=(blocks,),
    grid_names=("block",),
    num_threads=WARPGROUPS + 1,
    thread_name="warpgroup",
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    **cluster,
  )
  # Over which axes of a mesh it varies is not said by the call.
  return vary(kernel(*tables, a.values, scales_a, b.values, scales_b), a.values)[0]


def _kernel(tables, schedule, tiles, stages, blocks, write, masked, *refs, full, empty, staging, **rings):
  tables, (a, scales_a, b, scales_b, out) = refs[:tables], refs[tables:]
  block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
  member = lax.axis_index("cluster") if tiles.cluster > 1 else 0

  def each_tile(visit):
    """Steps that visit(tile, steps before it) was called for, over this block's tiles."""

    def body(i, done):
      tile = schedule.tile(block + i * blocks, *tables)
      tile = tile._replace(row=tile.row + member * tiles.m)
      visit(tile, done)
      return done + tile.steps

    return lax.fori_loop(0, (schedule.count(*tables) - block + blocks - 1) // blocks, body, jnp.int32(0))

  @pl.when(warpgroup == WARPGROUPS)
  def _():
    plgpu.set_max_registers(COPYING, action="decrease")
    copies = functools.partial(_copies, tiles, stages, a, scales_a, b, scales_b, full, empty, rings)
    done = each_tile(copies)
    # No one may arrive at a barrier of a block that has ended.
    lax.fori_loop(
      jnp.maximum(done - stages, 0), done,
      lambda step, _: plgpu.barrier_wait(empty.at[lax.rem(step, stages)]), None,
    )  # fmt: skip

  @pl.when(warpgroup < WARPGROUPS)
  def _():
    plgpu.set_max_registers(MULTIPLYING, action="increase")

    def visit(tile, done):
      sums = _sums(tiles, stages, warpgroup, tile, done, scales_b, full, empty, rings, masked)
      first = warpgroup * WAVE * tiles.waves
      write(staging, out, tile, warpgroup, tile.row + first, sums)

    each_tile(visit)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _copies(tiles, stages, a, scales_a, b, scales_b, full, empty, rings, tile, done):
  """Copies a tile's operands into the ring, each step as soon as its stage is free."""
  rows, columns = pl.ds(tile.row, tiles.m), pl.ds(tile.column, tiles.n)
  b = b if tile.group is None or len(b.shape) == 2 else b.at[tile.group]
  shared = {"collective_axes": "cluster"} if tiles.cluster > 1 else {}

  def step(i, _):
    stage, k = lax.rem(done + i, stages), tile.first + i
    terms = pl.ds(k * BLOCK, BLOCK)
    pl.when(done + i >= stages)(lambda: plgpu.barrier_wait(empty.at[stage]))
    copy = lambda source, ring, **how: plgpu.copy_gmem_to_smem(source, rings[ring].at[stage], full.at[stage], **how)
    copy(a.at[rows, terms], "a_ring")
    copy(b.at[columns, terms], "b_ring", **shared)
    copy(scales_a.at[k, rows], "scales_a_ring")
    if rings["scales_b_ring"] is not None:
      copy(scales_b.at[k, columns], "scales_b_ring", **shared)

  lax.fori_loop(0, tile.steps, step, None)


def _sums(tiles, stages, warpgroup, tile, done, scales_b, full, empty, rings, masked):
  """The warpgroup's rows of a tile, float32: for each wave pieces of columns, [WAVE, width] each."""
  waves = [pl.ds((warpgroup * tiles.waves + wave) * WAVE, WAVE) for wave in range(tiles.waves)]
  of_rows = rings["scales_b_ring"]
  # Of a piece's columns all lie in one block of b.
  width = tiles.n if of_rows is not None else math.gcd(tiles.n, BLOCK)
  pieces = range(0, tiles.n, width)

  def step(i, sums):
    stage, k = lax.rem(done + i, stages), tile.first + i
    plgpu.barrier_wait(full.at[stage])
    if masked:
      pl.when((k * BLOCK < tile.start) | ((k + 1) * BLOCK > tile.end))(
        lambda: _mask(rings["a_ring"].at[stage], waves, tile.start - k * BLOCK, tile.end - k * BLOCK)
      )
    if of_rows is None:
      of_group = () if len(scales_b.shape) == 2 else (tile.group,)
      last = scales_b.shape[-2] - 1  # a tile may stick out
      scales = [scales_b[*of_group, jnp.minimum((tile.column + piece) // BLOCK, last), k] for piece in pieces]
    new = []
    for wave, rows in enumerate(waves):

      def multiply(accumulator, rows=rows, last=wave == tiles.waves - 1):
        plgpu.wgmma(accumulator, rings["a_ring"].at[stage, rows], rings["b_ring"].at[stage].T)
        # While it multiplies. The next copy to this stage is another proxy's, which the commit orders after the reads.
        down = plgpu.load(rings["scales_a_ring"].at[stage, rows], layout=plgpu.Layout.WGMMA.reduce(1))
        across = None if of_rows is None else plgpu.load(of_rows.at[stage], layout=plgpu.Layout.WGMMA.reduce(0))
        if last:
          plgpu.commit_smem()
        return accumulator[...], down, across

      terms, down, across = pl.run_scoped(multiply, plgpu.ACC((WAVE, tiles.n), jnp.float32))
      if wave == tiles.waves - 1:
        plgpu.barrier_arrive(empty.at[stage])
      if of_rows is None:
        new.append([
          total + terms[:, piece : piece + width] * lax.broadcast_in_dim(down * scale, total.shape, (0,))
          for piece, scale, total in zip(pieces, scales, sums[wave], strict=True)
        ])  # fmt: skip
      else:
        down, across = (lax.broadcast_in_dim(x, terms.shape, (i,)) for i, x in enumerate((down, across)))
        new.append([sums[wave][0] + terms * across * down])
    return new

  zeros = [
    [plgpu.layout_cast(jnp.zeros((WAVE, width), jnp.float32), plgpu.Layout.WGMMA) for _ in pieces] for _ in waves
  ]
  return lax.fori_loop(0, tile.steps, step, zeros)


def _mask(values, waves, start, end):
  """Zeros where `values` [rows, BLOCK] are outside columns [start, end)."""
  for rows in waves:
    x = plgpu.load(values.at[rows], layout=plgpu.Layout.WGMMA_8BIT)
    column = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=plgpu.Layout.WGMMA_8BIT)
    keep = jnp.where((column >= start) & (column < end), -1, 0).astype(jnp.int8)
    bits = lax.bitcast_convert_type(x, jnp.int8)  # bitwise operations are the ones that exist for 8-bit types
    values[rows] = lax.bitcast_convert_type(bits & keep, x.dtype)
  plgpu.commit_smem()


def _store_wave(staging, out, row, column, pieces):
  """`pieces` of columns, staged by this warpgroup, to `out` from (row, column) on: TMA leaves out what lies outside."""
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the wave before
  width = pieces[0].shape[1]
  for i, piece in enumerate(pieces):
    staging[:, i * width : (i + 1) * width] = piece.astype(staging.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(staging, out.at[pl.ds(row, WAVE), pl.ds(column, staging.shape[1])])


class Whole:
  """Tiles of which every row that exists is the tile's own."""

  @staticmethod
  def scratch(tiles, dtype):
    """(what `write` stages, its bytes)."""
    shape = WARPGROUPS, WAVE, tiles.n
    return plgpu.SMEM(shape, dtype, transforms=transforms(dtype)), math.prod(shape) * jnp.dtype(dtype).itemsize

  @staticmethod
  def write(staging, out, tile, warpgroup, first, sums):
    out = out if len(out.shape) == 2 else out.at[tile.group]
    for wave, pieces in enumerate(sums):
      _store_wave(staging.at[warpgroup], out, first + wave * WAVE, tile.column, pieces)


class Ragged:
  """Tiles of which rows [start, end) are written, and no others."""

  @staticmethod
  def scratch(tiles, dtype):
    whole, bytes_ = Whole.scratch(tiles, dtype)
    part = plgpu.SMEM((WARPGROUPS, WAVE, SWIZZLE // jnp.dtype(dtype).itemsize), dtype)
    return (whole, part), bytes_ + WARPGROUPS * WAVE * SWIZZLE

  @staticmethod
  def write(staging, out, tile, warpgroup, first, sums):
    whole, part = (x.at[warpgroup] for x in staging)
    for wave, pieces in enumerate(sums):
      row = first + wave * WAVE
      own = (tile.start <= row) & (row + WAVE <= tile.end)
      pl.when(own)(functools.partial(_store_wave, whole, out, row, tile.column, pieces))
      low, high = (jnp.clip(limit - row, 0, WAVE) for limit in (tile.start, tile.end))
      pl.when(~own & (high > low))(functools.partial(_store_rows, part, out, row, low, high - low, tile.column, pieces))


def _store_rows(part, out, row, low, count, column, pieces):
  """`count` < WAVE rows from `low` on. Shapes of copies are fixed: rows are copied by the bits of `count`."""
  (_, chunk), width = part.shape, pieces[0].shape[1]
  for i, piece in enumerate(pieces):
    for at in range(0, width, chunk):
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      _compat.store(part, piece[:, at : at + chunk].astype(part.dtype))
      plgpu.commit_smem()
      columns, start = pl.ds(column + i * width + at, chunk), low
      for rows in (32, 16, 8, 4, 2, 1):

        @pl.when(count & rows != 0)
        def _(start=start, rows=rows, columns=columns):
          plgpu.copy_smem_to_gmem(part.at[pl.ds(start, rows)], out.at[pl.ds(row + start, rows), columns])

        start += count & rows


STORES = {"whole": Whole, "ragged": Ragged}
