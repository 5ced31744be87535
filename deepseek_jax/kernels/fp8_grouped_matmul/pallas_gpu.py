"""The kernel of kernels/hopper.py, with tiles of each group's rows, or of each group's own result."""

import jax
import jax.numpy as jnp

from deepseek_jax.kernels import hopper
from deepseek_jax.kernels.implementations import vary
from deepseek_jax.kernels.tiles import BLOCK, tiles_for


def matmul(a, b, group_sizes, step, out_dtype, tiles=None):
  (m, k), (groups, n, _) = a.shape, b.shape
  a, b = hopper.operand(a, "a", hopper.ROWS), hopper.operand(b, "b", hopper.COLUMNS, (BLOCK,))
  a, b, group_sizes = vary(a, b, group_sizes)
  tiles = tiles or tiles_for("fp8_grouped_matmul", out_dtype, m, n, k, groups)
  total, visits = _visits(group_sizes, m, tiles.m * tiles.cluster)
  across = -(-n // tiles.n)

  def tile(i, total, visits):
    visit, column = hopper.banded(i, total[0], across, tiles.band)
    group, row, start, end = (visits[field, visit] for field in range(4))
    steps = jnp.where(group < groups, a.scales.shape[1], 0)
    return hopper.Tile(row, column * tiles.n, jnp.int32(0), steps, group, start, end)

  schedule = hopper.Schedule(lambda total, visits: total[0] * across, tile, visits.shape[1] * across)
  out = hopper.result((a.shape[0], b.shape[1]), out_dtype)
  return hopper.product((total, visits), a, b, out, schedule, tiles, "ragged")[:m, :n]


def wgrad(a, b, group_sizes, step, out_dtype, tiles=None):
  (m, k), n, groups = a.shape, b.shape[0], group_sizes.size
  a, b = hopper.operand(a, "a", hopper.ROWS), hopper.operand(b, "b", hopper.COLUMNS)
  a, b, group_sizes = vary(a, b, group_sizes)
  tiles = tiles or tiles_for("fp8_grouped_wgrad", out_dtype, groups * m, n, k, groups)
  height = tiles.m * tiles.cluster
  down, across = -(-m // height), -(-n // tiles.n)
  ends = jnp.cumsum(group_sizes)

  def tile(i, starts, ends):
    group = i // (down * across)
    row, column = hopper.banded(jax.lax.rem(i, down * across), down, across, tiles.band)
    start, end = starts[group], ends[group]
    first = start // BLOCK
    steps = jnp.where(end > start, (end + BLOCK - 1) // BLOCK - first, 0)
    return hopper.Tile(row * height, column * tiles.n, first, steps, group, start, end)

  most = groups * down * across
  schedule = hopper.Schedule(lambda *_: most, tile, most)
  out = hopper.result((groups, a.shape[0], b.shape[0]), out_dtype)
  return hopper.product((ends - group_sizes, ends), a, b, out, schedule, tiles, "whole", masked=True)[:, :m, :n]


def _visits(group_sizes, rows, tile):
  """([1] number of visits, [4, at least that] of each visit the group, the first of `tile` rows, the group's start and end).

  Rows of no group are those of one more group.
  """
  sizes = jnp.append(group_sizes, rows - group_sizes.sum())
  ends = jnp.cumsum(sizes)
  starts = ends - sizes
  first = starts // hopper.ROWS * hopper.ROWS
  counts = jnp.where(sizes > 0, -(-(ends - first) // tile), 0)
  until = jnp.cumsum(counts)
  visit = jnp.arange((rows + (hopper.ROWS - 1) * sizes.size) // tile + sizes.size)
  group = jnp.minimum(jnp.searchsorted(until, visit, side="right", method="compare_all"), sizes.size - 1)
  row = first[group] + (visit - (until - counts)[group]) * tile
  return until[-1:].astype(jnp.int32), jnp.stack([group, row, starts[group], ends[group]]).astype(jnp.int32)
