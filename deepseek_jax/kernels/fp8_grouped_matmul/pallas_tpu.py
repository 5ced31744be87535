"""The dense kernel's tiles, of which each visit takes those of one group; a tile at a border is visited by each of its groups."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deepseek_jax.kernels.fp8_matmul import pallas_tpu as dense
from deepseek_jax.kernels.implementations import vary


def matmul(a, b, group_sizes, step, out_dtype):
  dense.check(a, b)
  a, b, group_sizes = vary(dense.whole_steps(a), dense.whole_steps(b), group_sizes)
  (m, k), (groups, n), block = a.shape, b.shape[:2], a.tile[1]
  # Those of a usual group, of which `step` is about half.
  rows, columns = min(dense.TILE[0], dense.up(min(2 * step, m), 32)), min(dense.TILE[1], dense.up(n, dense.LANES))
  chunks = dense.chunks_of(k // block, block, rows, columns)
  steps, tiles = k // block // chunks, -(-m // rows)
  # Rows of no group are a last one, whose results are zeros.
  ends = jnp.append(jnp.cumsum(group_sizes), m)
  visits = _visits(jnp.append(group_sizes, m - ends[-2]), rows, tiles, 0)

  def kernel(_, group_of, tile_of, ends, *refs):
    *operands, y, total = refs
    visit, step = pl.program_id(1), pl.program_id(2)
    group, tile = group_of[visit], tile_of[visit]
    dense.clear(total, step == 0)

    @pl.when(group < groups)
    def _():
      dense.accumulate(*operands, total, block, step * chunks)

    @pl.when(step == steps - 1)
    def _():
      row = tile * rows + jax.lax.broadcasted_iota(jnp.int32, total.shape, 0)
      own = (row < ends[group]) & (row >= jnp.where(group > 0, ends[jnp.maximum(group - 1, 0)], 0))
      first = (visit == 0) | (tile_of[jnp.maximum(visit - 1, 0)] != tile)
      others = jnp.where(first, jnp.zeros_like(total), y[...].astype(jnp.float32))
      y[...] = jnp.where(own, total[...], others).astype(out_dtype)

  of_scales = lambda step: step * chunks // dense.LANES
  matrix = lambda visit, group_of: jnp.minimum(group_of[visit], groups - 1)
  return pl.pallas_call(
    kernel,
    name="fp8_grouped_matmul",
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(-(-n // columns), visits[0][0], steps),
      in_specs=[
        pl.BlockSpec((rows, chunks * block), lambda j, v, step, _, group, tile, ends: (tile[v], step)),
        pl.BlockSpec((rows, dense.LANES), lambda j, v, step, _, group, tile, ends: (tile[v], of_scales(step))),
        pl.BlockSpec(
          (None, columns, chunks * block), lambda j, v, step, _, group, tile, ends: (matrix(v, group), j, step)
        ),
        pl.BlockSpec(
          (None, dense.scale_rows(k // block), columns),
          lambda j, v, step, _, group, tile, ends: (matrix(v, group), of_scales(step), j),
        ),
      ],
      out_specs=pl.BlockSpec((rows, columns), lambda j, v, step, _, group, tile, ends: (tile[v], j)),
      scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
    ),
    out_shape=dense.like((m, n), out_dtype, a),
    compiler_params=_params("parallel", "arbitrary", "arbitrary"),
    cost_estimate=pl.CostEstimate(
      flops=2 * m * n * k,
      bytes_accessed=m * k * -(-n // columns) + groups * n * k + m * n * jnp.dtype(out_dtype).itemsize,
      transcendentals=0,
    ),
  )(*visits, ends, a.values, dense.scales_of_rows(a), b.values, dense.scales_of_columns(b))


def wgrad(a, b, group_sizes, step, out_dtype):
  dense.check(a, b)
  a, b, group_sizes = vary(dense.whole_steps(a), dense.whole_steps(b), group_sizes)
  (m, k), n, groups, block = a.shape, b.shape[0], group_sizes.size, a.tile[1]
  rows, columns = min(dense.TILE[0], dense.up(m, 32)), min(dense.TILE[1], dense.up(n, dense.LANES))
  chunks = dense.chunks_of(k // block, block, rows, columns)
  width = chunks * block
  ends = jnp.cumsum(group_sizes)
  visits = _visits(group_sizes, width, k // width, 1)

  def kernel(count, group_of, tile_of, ends, *refs):
    *operands, dw, total = refs
    visit = pl.program_id(2)
    group, start = group_of[visit], tile_of[visit] * width
    begin, end = jnp.where(group > 0, ends[jnp.maximum(group - 1, 0)], 0) - start, ends[group] - start
    dense.clear(total, (visit == 0) | (group_of[jnp.maximum(visit - 1, 0)] != group))

    @pl.when(end > begin)
    def _():
      span = jnp.maximum(begin, 0), jnp.minimum(end, width)
      dense.accumulate(*operands, total, block, tile_of[visit] * chunks, span)

    last = visit == count[0] - 1

    @pl.when(last | (group_of[jnp.where(last, visit, visit + 1)] != group))
    def _():
      dw[...] = total[...].astype(out_dtype)

  of_scales = lambda tile: tile * chunks // dense.LANES
  return pl.pallas_call(
    kernel,
    name="fp8_grouped_wgrad",
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(-(-m // rows), -(-n // columns), visits[0][0]),
      in_specs=[
        pl.BlockSpec((rows, width), lambda i, j, v, _, group, tile, ends: (i, tile[v])),
        pl.BlockSpec((rows, dense.LANES), lambda i, j, v, _, group, tile, ends: (i, of_scales(tile[v]))),
        pl.BlockSpec((columns, width), lambda i, j, v, _, group, tile, ends: (j, tile[v])),
        pl.BlockSpec(
          (dense.scale_rows(k // block), columns), lambda i, j, v, _, group, tile, ends: (of_scales(tile[v]), j)
        ),
      ],
      out_specs=pl.BlockSpec((None, rows, columns), lambda i, j, v, _, group, tile, ends: (group[v], i, j)),
      scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
    ),
    out_shape=dense.like((groups, m, n), out_dtype, a),
    compiler_params=_params("parallel", "parallel", "arbitrary"),
    cost_estimate=pl.CostEstimate(
      flops=2 * m * n * k,
      bytes_accessed=m * k * -(-n // columns) + n * k * -(-m // rows) + groups * m * n * jnp.dtype(out_dtype).itemsize,
      transcendentals=0,
    ),
  )(*visits, ends, a.values, dense.scales_of_rows(a), b.values, dense.scales_of_columns(b))


def _params(*semantics):
  return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=dense.VMEM_BYTES)


def _visits(group_sizes, rows, tiles, least):
  """(number of visits [1], the group of each, its tile of `rows` rows): groups in turn, of each the tiles in which it has rows.

  least: visits of a group without rows. The last two hold [tiles + groups], of which so many are made.
  """
  ends = jnp.cumsum(group_sizes)
  first = (ends - group_sizes) // rows
  counts = jnp.where(group_sizes > 0, -(-ends // rows) - first, least)
  until = jnp.cumsum(counts)
  visit = jnp.arange(tiles + group_sizes.size)
  group = jnp.minimum((visit[:, None] >= until).sum(1), group_sizes.size - 1)
  tile = jnp.minimum((first - until + counts)[group] + visit, tiles - 1)
  return until[-1:], group.astype(jnp.int32), tile.astype(jnp.int32)
