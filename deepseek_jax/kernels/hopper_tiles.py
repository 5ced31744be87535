"""Matrices to FP8 on Hopper GPUs: what the quantiser and the fused activation share.

Each thread block reads a tile of 128 x 128 of its arguments into shared memory, once, and takes the greatest magnitudes there
along rows, along columns or over all.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepseek_jax.kernels import _compat
from deepseek_jax.kernels.fp8_matmul.xla import padded
from deepseek_jax.kernels.hopper import transforms
from deepseek_jax.kernels.implementations import Unsupported, vary
from deepseek_jax.kernels.qtensor import FP8, QTensor, greatest_of, scales_of
from deepseek_jax.kernels.tiles import BLOCK, WAVE


def rounded(x, tile, pow2_scales):
  """`x` [..., rows, columns] with tiles (1, 128) or (128, 128)."""
  if tile not in ((1, BLOCK), (BLOCK, BLOCK)):
    raise Unsupported(f"kernels for Hopper quantise tiles of 1 or {BLOCK} x {BLOCK}, not {tile[0]} x {tile[1]}")
  rows, columns = x.shape[-2:]
  # A matrix after the other: no tile may have rows of two.
  x = whole(x)
  flat = x.reshape(-1, x.shape[-1])
  squares = tile[0] > 1
  values, scales = _call(lambda x: x, [flat], pow2_scales, squares=squares)
  scales = scales.reshape(*x.shape[:-2], -1, scales.shape[1]) if squares else scales.T.reshape(*x.shape[:-1], -1)
  down = -(-rows // tile[0])
  return QTensor(values.reshape(x.shape)[..., :rows, :columns], scales[..., :down, :], tile)


def rounded_both(function, xs, block, pow2_scales):
  """`function` of float32 tiles of `xs` [rows, columns], elementwise: (the result, its transpose), with tiles (1, block)."""
  if block != BLOCK:
    raise Unsupported(f"kernels for Hopper quantise tiles of 1 x {BLOCK}, not 1 x {block}")
  rows, columns = xs[0].shape
  xs = [whole(x) for x in xs]
  if all(x.dtype == jnp.bfloat16 for x in xs):
    values, scales, values_t, scales_t = _call(function, xs, pow2_scales, both=True)
  else:  # loads that transpose are of 16 bits: XLA transposes others
    (values, scales), (values_t, scales_t) = (_call(function, a, pow2_scales) for a in (xs, [x.T for x in xs]))
  along = QTensor(values[:rows, :columns], scales.T[:rows], (1, block))
  return along, QTensor(values_t[:columns, :rows], scales_t.T[:columns], (1, block))


def whole(x):
  """`x` with zeros up to whole tiles.

  Raises:
    Unsupported: a dtype that is not read.
  """
  _compat.check_mosaic_gpu()
  if x.dtype not in (jnp.bfloat16, jnp.float32) or not x.size:
    raise Unsupported(f"kernels for Hopper quantise float32 and bfloat16, not {x.dtype} {x.shape}")
  return padded(padded(x, -1, -x.shape[-1] % BLOCK), -2, -x.shape[-2] % BLOCK)


def _call(function, xs, pow2_scales, squares=False, both=False):
  xs = vary(*xs)
  rows, columns = xs[0].shape
  down, across, shape = rows // BLOCK, columns // BLOCK, jax.ShapeDtypeStruct
  # Scales as the products read them, those of a tile's rows beside one another.
  out = [shape((rows, columns), FP8), shape((down, across) if squares else (across, rows), jnp.float32)]
  if both:
    out += [shape((columns, rows), FP8), shape((down, columns), jnp.float32)]
  square = BLOCK, BLOCK
  kernel = plgpu.kernel(
    functools.partial(_kernel, function, len(xs), pow2_scales, squares, both),
    out_type=out,
    scratch_types={
      "tiles": [plgpu.SMEM(square, x.dtype, transforms=transforms(x.dtype)) for x in xs],
      "fp8_tiles": [plgpu.SMEM(square, FP8, transforms=transforms(FP8)) for _ in range(1 + both)],
      "arrived": plgpu.Barrier(num_arrivals=len(xs)),
    },
    grid=(across, down),
    grid_names=("across", "down"),
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True),
  )
  # Over which axes of a mesh they vary is not said by the call.
  return vary(kernel(*xs), xs)[0]


def _kernel(function, count, pow2_scales, squares, both, *refs, tiles, fp8_tiles, arrived):
  xs, (values, scales, *transposed) = refs[:count], refs[count:]
  across, down = lax.axis_index("across"), lax.axis_index("down")
  rows, columns = pl.ds(down * BLOCK, BLOCK), pl.ds(across * BLOCK, BLOCK)
  for x, tile in zip(xs, tiles, strict=True):
    plgpu.copy_gmem_to_smem(x.at[rows, columns], tile, arrived)
  plgpu.barrier_wait(arrived)

  def wave(i, transpose):
    """[WAVE, BLOCK] of the result or its transpose, float32."""
    part = pl.ds(i * WAVE, WAVE)
    load = functools.partial(plgpu.load, layout=plgpu.Layout.WGMMA, optimized=False)
    return function(*(load(t.at[:, part].T if transpose else t.at[part]).astype(jnp.float32) for t in tiles))

  def write(i, x, scale, out):
    out_part = out.at[pl.ds(i * WAVE, WAVE)]
    _compat.store(out_part, (x / lax.broadcast_in_dim(scale, x.shape, (0,) if scale.shape else ())).astype(FP8))

  waves = range(BLOCK // WAVE)
  if squares:
    greatest = functools.reduce(jnp.maximum, (greatest_of(wave(i, False), 1) for i in waves))
    scale = scales_of(greatest_of(greatest, 0), pow2_scales)
    scales[down, across] = scale
    for i in waves:
      write(i, wave(i, False), scale, fp8_tiles[0])
  else:
    _rows(functools.partial(wave, transpose=False), write, waves, pow2_scales, scales.at[across], down, fp8_tiles[0])
  if both:
    _rows(
      functools.partial(wave, transpose=True), write, waves, pow2_scales, transposed[1].at[down], across, fp8_tiles[1]
    )
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(fp8_tiles[0], values.at[rows, columns])
  if both:
    plgpu.copy_smem_to_gmem(fp8_tiles[1], transposed[0].at[columns, rows])
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _rows(wave, write, waves, pow2_scales, scales, tile, out):
  for i in waves:
    x = wave(i)
    scale = scales_of(greatest_of(x, 1), pow2_scales)
    _compat.store(scales.at[pl.ds(tile * BLOCK + i * WAVE, WAVE)], scale)
    write(i, x, scale, out)
