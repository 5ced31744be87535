"""The tiles of the dense kernel, visited by group: a tile at a border once for each group with rows in it."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from deepseek_jax.kernels.fp8_matmul import pallas_tpu as dense
from deepseek_jax.kernels.implementations import match_vma
from deepseek_jax.kernels.qtensor import QTensor


def matmul(a: QTensor, b: QTensor, group_sizes: jax.Array, step: int, out_dtype: DTypeLike) -> jax.Array:
  a, b, group_sizes = match_vma(dense.pad_to_steps(a), dense.pad_to_steps(b), group_sizes)
  (m, k), (groups, n), block = a.shape, b.shape[:2], a.tile[1]
  # The rows of a usual group, of which `step` is about half.
  rows = min(dense.TILE[0], dense.round_up(min(2 * step, m), 32))
  columns = min(dense.TILE[1], dense.round_up(n, dense.LANES))
  step_blocks = dense.blocks_per_step(k // block, block, rows, columns)
  steps, row_tiles = k // block // step_blocks, -(-m // rows)
  # Rows of no group are those of one more group, whose results are zeros.
  ends = jnp.append(jnp.cumsum(group_sizes), m)
  visits = _group_visits(jnp.append(group_sizes, m - ends[-2]), rows, row_tiles, 0)

  def kernel(_, group_ids, tile_ids, ends, a, a_scales, b, b_scales, y, total):
    visit, step = pl.program_id(1), pl.program_id(2)
    group, tile = group_ids[visit], tile_ids[visit]
    dense.zero_when(step == 0, total)

    @pl.when(group < groups)
    def accumulate():
      dense.accumulate_blocks(a, a_scales, b, b_scales, total, block, step * step_blocks)

    @pl.when(step == steps - 1)
    def store():
      row = tile * rows + jax.lax.broadcasted_iota(jnp.int32, total.shape, 0)
      in_group = (row < ends[group]) & (row >= jnp.where(group > 0, ends[jnp.maximum(group - 1, 0)], 0))
      first_visit = (visit == 0) | (tile_ids[jnp.maximum(visit - 1, 0)] != tile)
      other_groups = jnp.where(first_visit, jnp.zeros_like(total), y[...].astype(jnp.float32))
      y[...] = jnp.where(in_group, total[...], other_groups).astype(out_dtype)

  def scale_index(step):
    return step * step_blocks // dense.LANES

  def matrix(visit, group_ids):
    return jnp.minimum(group_ids[visit], groups - 1)

  return pl.pallas_call(
    kernel,
    name="fp8_grouped_matmul",
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(-(-n // columns), visits[0][0], steps),
      in_specs=[
        pl.BlockSpec((rows, step_blocks * block), lambda j, v, step, _, group, tile, ends: (tile[v], step)),
        pl.BlockSpec((rows, dense.LANES), lambda j, v, step, _, group, tile, ends: (tile[v], scale_index(step))),
        pl.BlockSpec(
          (None, columns, step_blocks * block), lambda j, v, step, _, group, tile, ends: (matrix(v, group), j, step)
        ),
        pl.BlockSpec(
          (None, dense.b_scale_rows(k // block), columns),
          lambda j, v, step, _, group, tile, ends: (matrix(v, group), scale_index(step), j),
        ),
      ],
      out_specs=pl.BlockSpec((rows, columns), lambda j, v, step, _, group, tile, ends: (tile[v], j)),
      scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
    ),
    out_shape=dense.output_type_like((m, n), out_dtype, a),
    compiler_params=_compiler_params("parallel", "arbitrary", "arbitrary"),
    cost_estimate=pl.CostEstimate(
      flops=2 * m * n * k,
      bytes_accessed=m * k * -(-n // columns) + groups * n * k + m * n * jnp.dtype(out_dtype).itemsize,
      transcendentals=0,
    ),
  )(*visits, ends, a.values, dense.pad_scales_to_lanes(a), b.values, dense.transpose_scales(b))


def wgrad(a: QTensor, b: QTensor, group_sizes: jax.Array, step: int, out_dtype: DTypeLike) -> jax.Array:
  a, b, group_sizes = match_vma(dense.pad_to_steps(a), dense.pad_to_steps(b), group_sizes)
  (m, k), n, groups, block = a.shape, b.shape[0], group_sizes.size, a.tile[1]
  rows = min(dense.TILE[0], dense.round_up(m, 32))
  columns = min(dense.TILE[1], dense.round_up(n, dense.LANES))
  step_blocks = dense.blocks_per_step(k // block, block, rows, columns)
  width = step_blocks * block
  ends = jnp.cumsum(group_sizes)
  visits = _group_visits(group_sizes, width, k // width, 1)

  def kernel(count, group_ids, tile_ids, ends, a, a_scales, b, b_scales, dw, total):
    visit = pl.program_id(2)
    group, start = group_ids[visit], tile_ids[visit] * width
    begin, end = jnp.where(group > 0, ends[jnp.maximum(group - 1, 0)], 0) - start, ends[group] - start
    dense.zero_when((visit == 0) | (group_ids[jnp.maximum(visit - 1, 0)] != group), total)

    @pl.when(end > begin)
    def accumulate():
      k_range = jnp.maximum(begin, 0), jnp.minimum(end, width)
      dense.accumulate_blocks(a, a_scales, b, b_scales, total, block, tile_ids[visit] * step_blocks, k_range)

    last = visit == count[0] - 1

    @pl.when(last | (group_ids[jnp.where(last, visit, visit + 1)] != group))
    def store():
      dw[...] = total[...].astype(out_dtype)

  def scale_index(tile):
    return tile * step_blocks // dense.LANES

  return pl.pallas_call(
    kernel,
    name="fp8_grouped_wgrad",
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(-(-m // rows), -(-n // columns), visits[0][0]),
      in_specs=[
        pl.BlockSpec((rows, width), lambda i, j, v, _, group, tile, ends: (i, tile[v])),
        pl.BlockSpec((rows, dense.LANES), lambda i, j, v, _, group, tile, ends: (i, scale_index(tile[v]))),
        pl.BlockSpec((columns, width), lambda i, j, v, _, group, tile, ends: (j, tile[v])),
        pl.BlockSpec(
          (dense.b_scale_rows(k // block), columns), lambda i, j, v, _, group, tile, ends: (scale_index(tile[v]), j)
        ),
      ],
      out_specs=pl.BlockSpec((None, rows, columns), lambda i, j, v, _, group, tile, ends: (group[v], i, j)),
      scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
    ),
    out_shape=dense.output_type_like((groups, m, n), out_dtype, a),
    compiler_params=_compiler_params("parallel", "parallel", "arbitrary"),
    cost_estimate=pl.CostEstimate(
      flops=2 * m * n * k,
      bytes_accessed=m * k * -(-n // columns) + n * k * -(-m // rows) + groups * m * n * jnp.dtype(out_dtype).itemsize,
      transcendentals=0,
    ),
  )(*visits, ends, a.values, dense.pad_scales_to_lanes(a), b.values, dense.transpose_scales(b))


def _compiler_params(*dimension_semantics):
  return pltpu.CompilerParams(dimension_semantics=dimension_semantics, vmem_limit_bytes=dense.VMEM_BYTES)


def _group_visits(group_sizes, rows, tiles, min_visits):
  """Each group's visits to the tiles of `rows` rows in which it has some: ([1] how many, group ids, tile ids).

  Group after group. min_visits: of a group without rows. Ids are [tiles + groups] int32, as many visits as there can
  be.
  """
  ends = jnp.cumsum(group_sizes)
  first_tile = (ends - group_sizes) // rows
  counts = jnp.where(group_sizes > 0, -(-ends // rows) - first_tile, min_visits)
  count_ends = jnp.cumsum(counts)
  visit = jnp.arange(tiles + group_sizes.size)
  group = jnp.minimum((visit[:, None] >= count_ends).sum(1), group_sizes.size - 1)
  tile = jnp.minimum((first_tile - count_ends + counts)[group] + visit, tiles - 1)
  return count_ends[-1:], group.astype(jnp.int32), tile.astype(jnp.int32)
