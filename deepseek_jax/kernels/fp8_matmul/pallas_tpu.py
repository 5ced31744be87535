"""FP8 GEMM on TPUs: output tiles in VMEM accumulate the matrix unit's product of each block of the contraction, scaled.

The unit multiplies e4m3fn as it is. Before TPU7x it does so at the rate of bfloat16: FP8 saves bytes there, not time.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from deepseek_jax.kernels._compat import Ref
from deepseek_jax.kernels.fp8_matmul.xla import pad_contraction, pad_with_zeros
from deepseek_jax.kernels.implementations import match_vma
from deepseek_jax.kernels.qtensor import QTensor

LANES = 128  # of a register; one holds the scales of as many blocks
TILE = 512, 512  # of the output: each byte of an operand is multiplied as often
STEP_BYTES = 40 * 2**20  # of the 64 MiB of VMEM that v5p and TPU7x have; v5e and v6e have 128
VMEM_BYTES = 56 * 2**20
ROWS = 256  # multiplied at a time with what the matrix unit holds


def matmul(a: QTensor, b: QTensor, out_dtype: DTypeLike) -> jax.Array:
  a, b = match_vma(*(pad_to_steps(q) for q in (a, b)))
  (m, k), n, block = a.shape, b.shape[0], a.tile[1]
  rows, columns = min(TILE[0], round_up(m, 32)), min(TILE[1], round_up(n, LANES))
  step_blocks = blocks_per_step(k // block, block, rows, columns)
  grid = -(-m // rows), -(-n // columns), k // block // step_blocks
  steps = grid[2]

  def kernel(a, a_scales, b, b_scales, y, total):
    step = pl.program_id(2)
    zero_when(step == 0, total)
    accumulate_blocks(a, a_scales, b, b_scales, total, block, step * step_blocks)

    @pl.when(step == steps - 1)
    def store():
      y[...] = total[...].astype(out_dtype)

  def scale_index(step):
    return step * step_blocks // LANES

  return pl.pallas_call(
    kernel,
    name="fp8_matmul",
    grid=grid,
    in_specs=[
      pl.BlockSpec((rows, step_blocks * block), lambda i, j, step: (i, step)),
      pl.BlockSpec((rows, LANES), lambda i, j, step: (i, scale_index(step))),
      pl.BlockSpec((columns, step_blocks * block), lambda i, j, step: (j, step)),
      pl.BlockSpec((b_scale_rows(k // block), columns), lambda i, j, step: (scale_index(step), j)),
    ],
    out_specs=pl.BlockSpec((rows, columns), lambda i, j, step: (i, j)),
    out_shape=output_type_like((m, n), out_dtype, a),
    scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * m * n * k,
      bytes_accessed=m * k * (grid[1] if steps > 1 else 1) + n * k * grid[0] + m * n * jnp.dtype(out_dtype).itemsize,
      transcendentals=0,
    ),
  )(a.values, pad_scales_to_lanes(a), b.values, transpose_scales(b))


def pad_to_steps(q: QTensor) -> QTensor:
  """`q` with zeros that fill its last tile, and of more than 32 tiles the last eight: steps of several divide them."""
  q = pad_contraction(q)
  missing = -q.scales.shape[-1] % 8 if q.scales.shape[-1] > 32 else 0
  return QTensor(pad_with_zeros(q.values, -1, missing * q.tile[1]), pad_with_zeros(q.scales, -1, missing), q.tile)


def blocks_per_step(blocks: int, block: int, rows: int, columns: int) -> int:
  """Blocks of the contraction in a step: the most that divide `blocks`, fit in VMEM, and have scales in a register."""
  most = STEP_BYTES // (2 * (rows + columns) * block)  # two steps' operands at a time
  fitting = (n for n in range(min(blocks, most), 0, -1) if blocks % n == 0 and (blocks <= LANES or LANES % n == 0))
  return next(fitting)


def b_scale_rows(blocks: int) -> int:
  """Rows of `transpose_scales(b)` that a step reads."""
  return min(blocks, LANES)


def pad_scales_to_lanes(a: QTensor) -> jax.Array:
  """Scales of `a` [m, k]: [m, blocks], padded to full registers."""
  return pad_with_zeros(a.scales, -1, -a.scales.shape[-1] % LANES)


def transpose_scales(b: QTensor) -> jax.Array:
  """The scale of each row of `b` [.., n, k], which is a column of the result: [.., blocks, n]."""
  return jnp.repeat(b.scales, b.tile[0], -2)[..., : b.shape[-2], :].mT


def zero_when(condition: jax.Array, total: Ref) -> None:
  """Zeroes the accumulator `total` where `condition`."""

  @pl.when(condition)
  def zero():
    total[...] = jnp.zeros_like(total)


def accumulate_blocks(
  a: Ref,
  a_scales: Ref,
  b: Ref,
  b_scales: Ref,
  total: Ref,
  block: int,
  first_block: int | jax.Array,
  k_range: tuple[jax.Array, jax.Array] | None = None,
) -> None:
  """Adds to `total` [m, n] the product of `a` [m, k] and the transpose of `b` [n, k], scaled every `block` of k.

  Args:
    a_scales, b_scales: [m, blocks] and [blocks, n]; those of this step start at `first_block`.
    k_range: (start, end) of k; what lies outside counts as zeros. By default all of k.
  """
  unroll = math.gcd(a.shape[1] // block, 8)  # blocks that the compiler overlaps
  width = unroll * block

  def add_block(c, k_range):
    column = c * block + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
    inside = k_range and (column >= k_range[0]) & (column < k_range[1])
    overlaps = k_range and (c * block < k_range[1]) & ((c + 1) * block > k_range[0])
    columns, scale = pl.ds(pl.multiple_of(c * block, block), block), (first_block + c) % a_scales.shape[1]
    rhs, rhs_scale = _apply_mask(b[:, columns], inside), _apply_mask(b_scales[pl.ds(scale, 1), :], overlaps)
    for start in range(0, a.shape[0], ROWS):
      rows = slice(start, min(start + ROWS, a.shape[0]))
      lhs, lhs_scale = _apply_mask(a[rows, columns], inside), a_scales[rows, :]
      # The block's scale in all lanes.
      lhs_scale = jnp.take_along_axis(lhs_scale, jnp.full(lhs_scale.shape, scale, jnp.int32), 1)
      lhs_scale = _apply_mask(lhs_scale, overlaps)
      product = jax.lax.dot_general(lhs, rhs, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
      total[rows, :] += product * jnp.concatenate([lhs_scale] * (total.shape[1] // LANES), 1) * rhs_scale

  def add_blocks(i, k_range):
    for c in range(unroll):
      add_block(i * unroll + c, k_range)

  def loop(i, _):
    if k_range is None:
      return add_blocks(i, None)
    inside = (i * width >= k_range[0]) & ((i + 1) * width <= k_range[1])
    pl.when(inside)(lambda: add_blocks(i, None))
    pl.when(jnp.logical_not(inside))(lambda: add_blocks(i, k_range))

  begin, end = (0, a.shape[1]) if k_range is None else k_range
  jax.lax.fori_loop(begin // width, -(-end // width), loop, None)


def _apply_mask(x, mask):
  """Zeros where not `mask`, if there is one. Not by a product: zero times NaN is NaN."""
  if mask is None:
    return x
  bits = x if x.dtype == jnp.float32 else pltpu.bitcast(x, jnp.int32)  # of FP8, four rows
  bits = jnp.where(mask, bits, jnp.zeros_like(bits))
  return bits if x.dtype == jnp.float32 else pltpu.bitcast(bits, x.dtype)


def round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


def output_type_like(shape: tuple[int, ...], dtype: DTypeLike, q: QTensor) -> jax.ShapeDtypeStruct:
  """The type of a result that varies over mesh axes as `q` does."""
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(q.values).manual_axis_type)
