"""Quantization to FP8 on Hopper GPUs: what the kernels of `quantize` and `swiglu` share.

Each thread block reads a tile of 128 x 128 of its inputs into shared memory once, and takes the absmax there along
rows, along columns or over the whole tile.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepseek_jax.kernels import _compat
from deepseek_jax.kernels.fp8_matmul.xla import pad_with_zeros
from deepseek_jax.kernels.hopper import smem_transforms
from deepseek_jax.kernels.implementations import match_vma
from deepseek_jax.kernels.qtensor import FP8, QTensor, compute_absmax, compute_scales
from deepseek_jax.kernels.tiles import BLOCK, WGMMA_ROWS


def quantize_tiles(x: jax.Array, tile: tuple[int, int], pow2_scales: bool) -> QTensor:
  """`x` [..., rows, columns] in tiles (1, 128) or (128, 128). Raises Unsupported as `check_mosaic_gpu` does."""
  rows, columns = x.shape[-2:]
  # Each matrix is padded on its own: no tile may have rows of two.
  x = pad_to_tiles(x)
  flat = x.reshape(-1, x.shape[-1])
  square = tile[0] > 1
  values, scales = _quantize_hopper(lambda x: x, [flat], pow2_scales, square=square)
  scales = scales.reshape(*x.shape[:-2], -1, scales.shape[1]) if square else scales.T.reshape(*x.shape[:-1], -1)
  scale_rows = -(-rows // tile[0])
  return QTensor(values.reshape(x.shape)[..., :rows, :columns], scales[..., :scale_rows, :], tile)


def apply_and_quantize_both_hopper(
  function: Callable[..., jax.Array], inputs: Sequence[jax.Array], block: int, pow2_scales: bool
) -> tuple[QTensor, QTensor]:
  """(rowwise, columnwise): y and its transpose, tiles (1, block) each, of y = `function`(*`inputs`).

  function: elementwise, of float32 arrays. inputs: [rows, columns] each. Raises Unsupported as `check_mosaic_gpu` does.
  """
  rows, columns = inputs[0].shape
  inputs = [pad_to_tiles(x) for x in inputs]
  if all(x.dtype == jnp.bfloat16 for x in inputs):
    values, scales, values_t, scales_t = _quantize_hopper(function, inputs, pow2_scales, both=True)
  else:  # loads that transpose are of 16 bits: XLA transposes others
    transposed = [x.T for x in inputs]
    values, scales = _quantize_hopper(function, inputs, pow2_scales)
    values_t, scales_t = _quantize_hopper(function, transposed, pow2_scales)
  rowwise = QTensor(values[:rows, :columns], scales.T[:rows], (1, block))
  return rowwise, QTensor(values_t[:columns, :rows], scales_t.T[:columns], (1, block))


def pad_to_tiles(x: jax.Array) -> jax.Array:
  """`x` with zeros up to full tiles of 128 x 128."""
  _compat.check_mosaic_gpu()
  return pad_with_zeros(pad_with_zeros(x, -1, -x.shape[-1] % BLOCK), -2, -x.shape[-2] % BLOCK)


def _quantize_hopper(function, inputs, pow2_scales, square=False, both=False):
  """(values, scales [tiles across, rows]) of `function` of `inputs`, and with `both` the pair of its transpose."""
  inputs = match_vma(*inputs)
  rows, columns = inputs[0].shape
  down, across, array = rows // BLOCK, columns // BLOCK, jax.ShapeDtypeStruct
  # Scales as the GEMMs read them: those of a tile's rows are contiguous.
  outputs = [array((rows, columns), FP8), array((down, across) if square else (across, rows), jnp.float32)]
  if both:
    outputs += [array((columns, rows), FP8), array((down, columns), jnp.float32)]
  tile = BLOCK, BLOCK
  kernel = plgpu.kernel(
    functools.partial(_kernel, function, len(inputs), pow2_scales, square, both),
    out_type=outputs,
    scratch_types={
      "tiles": [plgpu.SMEM(tile, x.dtype, transforms=smem_transforms(x.dtype)) for x in inputs],
      "fp8_tiles": [plgpu.SMEM(tile, FP8, transforms=smem_transforms(FP8)) for _ in range(1 + both)],
      "barrier": plgpu.Barrier(num_arrivals=len(inputs)),
    },
    grid=(across, down),
    grid_names=("across", "down"),
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True),
  )
  # The call does not type its results as varying over mesh axes.
  return match_vma(kernel(*inputs), inputs)[0]


def _kernel(function, count, pow2_scales, square, both, *refs, tiles, fp8_tiles, barrier):
  inputs, (values, scales, *transposed) = refs[:count], refs[count:]
  across, down = lax.axis_index("across"), lax.axis_index("down")
  rows, columns = pl.ds(down * BLOCK, BLOCK), pl.ds(across * BLOCK, BLOCK)
  for ref, tile in zip(inputs, tiles, strict=True):
    plgpu.copy_gmem_to_smem(ref.at[rows, columns], tile, barrier)
  plgpu.barrier_wait(barrier)

  def load_rows(i, transpose):
    """[WGMMA_ROWS, BLOCK] of the result or its transpose, float32."""
    chunk = pl.ds(i * WGMMA_ROWS, WGMMA_ROWS)
    load = functools.partial(_compat.load_smem, layout=plgpu.Layout.WGMMA, optimized=False)
    return function(*(load(t.at[:, chunk].T if transpose else t.at[chunk]).astype(jnp.float32) for t in tiles))

  def store_rows(i, x, scale, out):
    chunk = out.at[pl.ds(i * WGMMA_ROWS, WGMMA_ROWS)]
    _compat.store_smem(chunk, (x / lax.broadcast_in_dim(scale, x.shape, (0,) if scale.shape else ())).astype(FP8))

  chunks = range(BLOCK // WGMMA_ROWS)
  if square:
    absmax = functools.reduce(jnp.maximum, (compute_absmax(load_rows(i, False), 1) for i in chunks))
    scale = compute_scales(compute_absmax(absmax, 0), pow2_scales)
    scales[down, across] = scale
    for i in chunks:
      store_rows(i, load_rows(i, False), scale, fp8_tiles[0])
  else:
    load = functools.partial(load_rows, transpose=False)
    _quantize_rows(load, store_rows, chunks, pow2_scales, scales.at[across], down, fp8_tiles[0])
  if both:
    load = functools.partial(load_rows, transpose=True)
    _quantize_rows(load, store_rows, chunks, pow2_scales, transposed[1].at[down], across, fp8_tiles[1])
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(fp8_tiles[0], values.at[rows, columns])
  if both:
    plgpu.copy_smem_to_gmem(fp8_tiles[1], transposed[0].at[columns, rows])
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _quantize_rows(load_rows, store_rows, chunks, pow2_scales, scales, tile, out):
  """Quantizes the rows of a tile, each with a scale of its own; `tile` is its position in `scales`."""
  for i in chunks:
    x = load_rows(i)
    scale = compute_scales(compute_absmax(x, 1), pow2_scales)
    _compat.store_smem(scales.at[pl.ds(tile * BLOCK + i * WGMMA_ROWS, WGMMA_ROWS)], scale)
    store_rows(i, x, scale, out)
