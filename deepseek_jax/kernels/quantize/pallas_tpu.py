"""A row of tiles at a time in VMEM: one read of the matrix gives both of its FP8 copies."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deepseek_jax.kernels.implementations import Unsupported, vary
from deepseek_jax.kernels.qtensor import FP8, QTensor, scales_of

LANES = 128
ROWS = 256  # of tiles (1, block), which may be any number
STEP_BYTES = 8 * 2**20  # of what is read in a step; with what is written, twice, it fits in VMEM
VMEM_BYTES = 56 * 2**20


def quantize(x, tile, pow2_scales):
  rows, block = tile
  check([x], block, rows in (1, block), tile)
  matrices = x.reshape(-1, *x.shape[-2:]) if rows > 1 else x.reshape(1, -1, x.shape[-1])
  ((values, scales),) = quantized([matrices], lambda x: x, block, pow2_scales, square=rows > 1)
  return QTensor(values.reshape(x.shape), scales.reshape(*x.shape[:-2], -1, scales.shape[-1]), tile)


def quantize_both(x, block, pow2_scales):
  return both([x], lambda x: x, block, pow2_scales)


def both(inputs, function, block, pow2_scales):
  """(y, its transpose), tiles (1, block) each, of y = `function` of `inputs` [rows, columns] in float32, elementwise."""
  check(inputs, block, inputs[0].ndim == 2, (1, block))
  copies = quantized([x[None] for x in inputs], function, block, pow2_scales, transpose=True)
  return tuple(QTensor(values[0], scales[0], (1, block)) for values, scales in copies)


def check(inputs, block, tiles, tile):
  """Raises Unsupported."""
  floats = all(x.dtype in (jnp.float32, jnp.bfloat16) for x in inputs)
  if not tiles or block % LANES or not floats:
    raise Unsupported(
      f"operands are {inputs[0].dtype}{list(inputs[0].shape)} in tiles {tile}: the kernel for TPUs reads float32 and "
      f"bfloat16, in tiles (1, block) or (block, block), block a multiple of {LANES}"
    )


def quantized(inputs, function, block, pow2_scales, square=False, transpose=False):
  """[(values, scales)] of `function` of `inputs` [matrices, m, n], in tiles (1, block) or, `square`, (block, block).

  transpose: a second pair is of the transposed matrices.
  """
  inputs = vary(*inputs)
  count, m, n = inputs[0].shape
  rows = block if square or transpose else min(ROWS, -(-m // 32) * 32)
  across = -(-n // block)
  steps = -(-across // max(STEP_BYTES // (4 * rows * block), 1))
  tiles = -(-across // steps)  # of a step
  width, down = tiles * block, -(-m // rows)
  scale_rows = 1 if square else rows
  shapes = [((count, m, n), FP8), ((count, steps, down, scale_rows, tiles), jnp.float32)]
  blocks = [
    pl.BlockSpec((None, rows, width), lambda matrix, i, j: (matrix, i, j)),
    pl.BlockSpec((None, None, None, scale_rows, tiles), lambda matrix, i, j: (matrix, j, i, 0, 0)),
  ]
  if transpose:
    shapes += [((count, n, m), FP8), ((count, down, 1, n), jnp.float32)]
    blocks += [
      pl.BlockSpec((None, width, rows), lambda matrix, i, j: (matrix, j, i)),
      pl.BlockSpec((None, None, 1, width), lambda matrix, i, j: (matrix, i, 0, j)),
    ]
  kernel = functools.partial(_kernel, function, len(inputs), (m, n), block, pow2_scales, square)
  varying = jax.typeof(inputs[0]).manual_axis_type
  outputs = pl.pallas_call(
    kernel,
    name="quantize",
    grid=(count, down, steps),
    in_specs=[blocks[0]] * len(inputs),
    out_specs=blocks,
    out_shape=[jax.ShapeDtypeStruct(*shape, manual_axis_type=varying) for shape in shapes],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3, vmem_limit_bytes=VMEM_BYTES),
    cost_estimate=pl.CostEstimate(
      flops=0,  # of the matrix unit
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in inputs) + len(shapes) // 2 * count * m * n,
      transcendentals=0,
    ),
  )(*inputs)
  # Without it libtpu (0.0.42, 0.0.50) fuses the kernel with the update of a loop's stack, and fails on the layout of FP8.
  values, scales, *transposed = jax.lax.optimization_barrier(outputs)
  scales = jnp.moveaxis(scales, 1, 3).reshape(count, down * scale_rows, steps * tiles)
  found = [(values, scales[:, : down if square else m, :across])]
  return found + [(transposed[0], transposed[1][:, :, 0].mT)] if transpose else found


def _kernel(function, count, shape, block, pow2_scales, square, *refs):
  inputs, (values, scales, *transposed) = refs[:count], refs[count:]
  (rows, width), across = inputs[0].shape, scales.shape[1]
  row, column = pl.program_id(1) * rows, pl.program_id(2) * width

  def tile(i, along):
    at = pl.ds(pl.multiple_of(i * block, block), block)
    x = function(*(ref[:, at].astype(jnp.float32) for ref in inputs))
    if shape[0] % rows or shape[1] % block:  # beyond the edges is anything
      down, right = (jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
      x = jnp.where((row + down < shape[0]) & (column + i * block + right < shape[1]), x, 0)
    greatest = _greatest(x, 0)[None] if square or transposed else None
    scale = scales_of(_greatest(greatest if square else x, 1)[:, None], pow2_scales)  # [rows or 1, 1]
    values[:, at] = (x / scale).astype(FP8)
    if transposed:
      transposed[1][:, at] = scales_of(greatest, pow2_scales)
      transposed[0][at, :] = (x / scales_of(greatest, pow2_scales)).astype(FP8).T
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, along.shape, 1) == i, scale, along)

  together = math.gcd(across, 4)  # of which the compiler overlaps one with another

  def tiles(i, along):
    for j in range(together):
      along = tile(i * together + j, along)
    return along

  scales[...] = jax.lax.fori_loop(0, across // together, tiles, jnp.zeros_like(scales))


def _greatest(x, axis):
  """The greatest magnitude over `axis`, infinite if there is one that is not finite.

  Not as whole numbers, in `qtensor.greatest_of`'s way: the units that compare across lanes know floats.
  """
  x = jnp.abs(x)
  return jnp.where(x <= jnp.finfo(x.dtype).max, x, jnp.inf).max(axis)
