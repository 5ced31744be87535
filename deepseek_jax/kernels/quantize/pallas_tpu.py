"""Quantization on TPUs: a row of tiles at a time in VMEM, so that one read of the matrix gives both FP8 copies."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deepseek_jax.kernels.implementations import match_vma
from deepseek_jax.kernels.qtensor import FP8, QTensor, compute_scales

ROWS = 256  # rows of a step for tiles (1, block), which leave the number free
STEP_BYTES = 8 * 2**20  # of what is read in a step; with what is written, double-buffered, it fits in VMEM
VMEM_BYTES = 56 * 2**20


def quantize(x: jax.Array, tile: tuple[int, int], pow2_scales: bool) -> QTensor:
  rows, block = tile
  matrices = x.reshape(-1, *x.shape[-2:]) if rows > 1 else x.reshape(1, -1, x.shape[-1])
  ((values, scales),) = _quantize_tpu(lambda x: x, [matrices], block, pow2_scales, square=rows > 1)
  return QTensor(values.reshape(x.shape), scales.reshape(*x.shape[:-2], -1, scales.shape[-1]), tile)


def quantize_both(x: jax.Array, block: int, pow2_scales: bool) -> tuple[QTensor, QTensor]:
  return apply_and_quantize_both_tpu(lambda x: x, [x], block, pow2_scales)


def apply_and_quantize_both_tpu(
  function: Callable[..., jax.Array], inputs: Sequence[jax.Array], block: int, pow2_scales: bool
) -> tuple[QTensor, QTensor]:
  """(rowwise, columnwise): y and its transpose, tiles (1, block) each, of y = `function`(*`inputs`).

  function: elementwise, of float32 arrays. inputs: [rows, columns] each.
  """
  copies = _quantize_tpu(function, [x[None] for x in inputs], block, pow2_scales, transpose=True)
  rowwise, columnwise = (QTensor(values[0], scales[0], (1, block)) for values, scales in copies)
  return rowwise, columnwise


def _quantize_tpu(function, inputs, block, pow2_scales, square=False, transpose=False):
  """[(values, scales)] of `function` of `inputs` [matrices, m, n], in tiles (1, block) or, `square`, (block, block).

  transpose: a second pair is of the transposed matrices.
  """
  inputs = match_vma(*inputs)
  count, m, n = inputs[0].shape
  rows = block if square or transpose else min(ROWS, -(-m // 32) * 32)
  tiles_across = -(-n // block)
  steps = -(-tiles_across // max(STEP_BYTES // (4 * rows * block), 1))
  step_tiles = -(-tiles_across // steps)
  width, steps_down = step_tiles * block, -(-m // rows)
  scale_rows = 1 if square else rows
  shapes = [((count, m, n), FP8), ((count, steps, steps_down, scale_rows, step_tiles), jnp.float32)]
  block_specs = [
    pl.BlockSpec((None, rows, width), lambda matrix, i, j: (matrix, i, j)),
    pl.BlockSpec((None, None, None, scale_rows, step_tiles), lambda matrix, i, j: (matrix, j, i, 0, 0)),
  ]
  if transpose:
    shapes += [((count, n, m), FP8), ((count, steps_down, 1, n), jnp.float32)]
    block_specs += [
      pl.BlockSpec((None, width, rows), lambda matrix, i, j: (matrix, j, i)),
      pl.BlockSpec((None, None, 1, width), lambda matrix, i, j: (matrix, i, 0, j)),
    ]
  kernel = functools.partial(_kernel, function, len(inputs), (m, n), block, pow2_scales, square)
  vma = jax.typeof(inputs[0]).manual_axis_type
  outputs = pl.pallas_call(
    kernel,
    name="quantize",
    grid=(count, steps_down, steps),
    in_specs=[block_specs[0]] * len(inputs),
    out_specs=block_specs,
    out_shape=[jax.ShapeDtypeStruct(*shape, manual_axis_type=vma) for shape in shapes],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3, vmem_limit_bytes=VMEM_BYTES),
    cost_estimate=pl.CostEstimate(
      flops=0,  # of the matrix unit
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in inputs) + len(shapes) // 2 * count * m * n,
      transcendentals=0,
    ),
  )(*inputs)
  # Without the barrier libtpu (0.0.42, 0.0.50) fuses the kernel with the update of a loop's stack, and fails on the
  # layout of FP8.
  values, scales, *transposed = jax.lax.optimization_barrier(outputs)
  scales = jnp.moveaxis(scales, 1, 3).reshape(count, steps_down * scale_rows, steps * step_tiles)
  copies = [(values, scales[:, : steps_down if square else m, :tiles_across])]
  if transpose:
    copies.append((transposed[0], transposed[1][:, :, 0].mT))
  return copies


def _kernel(function, count, shape, block, pow2_scales, square, *refs):
  inputs, (values, scales, *transposed) = refs[:count], refs[count:]
  (rows, width), step_tiles = inputs[0].shape, scales.shape[1]
  row, column = pl.program_id(1) * rows, pl.program_id(2) * width

  def quantize_tile(i, step_scales):
    columns = pl.ds(pl.multiple_of(i * block, block), block)
    x = function(*(ref[:, columns].astype(jnp.float32) for ref in inputs))
    if shape[0] % rows or shape[1] % block:  # memory beyond the edges is undefined
      down, right = (jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
      x = jnp.where((row + down < shape[0]) & (column + i * block + right < shape[1]), x, 0)
    column_absmax: Any = _absmax(x, 0)[None] if square or transposed else None
    scale = compute_scales(_absmax(column_absmax if square else x, 1)[:, None], pow2_scales)  # [rows or 1, 1]
    values[:, columns] = (x / scale).astype(FP8)
    if transposed:
      transposed[1][:, columns] = compute_scales(column_absmax, pow2_scales)
      transposed[0][columns, :] = (x / compute_scales(column_absmax, pow2_scales)).astype(FP8).T
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, step_scales.shape, 1) == i, scale, step_scales)

  unroll = math.gcd(step_tiles, 4)  # tiles that the compiler overlaps

  def quantize_tiles(i, step_scales):
    for j in range(unroll):
      step_scales = quantize_tile(i * unroll + j, step_scales)
    return step_scales

  scales[...] = jax.lax.fori_loop(0, step_tiles // unroll, quantize_tiles, jnp.zeros_like(scales))


def _absmax(x, axis):
  """The largest magnitude over `axis`, infinite if one is not finite.

  Not by bits as `qtensor.compute_absmax` does: the units that compare across lanes compare floats.
  """
  x = jnp.abs(x)
  return jnp.where(x <= jnp.finfo(x.dtype).max, x, jnp.inf).max(axis)
