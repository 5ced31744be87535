"""Tiles of the result in VMEM, to which the matrix unit's product of each block of the contraction is added, scaled.

The unit multiplies e4m3fn as it is; before TPU7x at the rate of bfloat16, so that FP8 saves bytes there, not time.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deepseek_jax.kernels.fp8_matmul.xla import padded, whole
from deepseek_jax.kernels.implementations import Unsupported, device_kind, vary
from deepseek_jax.kernels.qtensor import FP8, QTensor

LANES = 128  # of a register, whose scales are of as many blocks
TILE = 512, 512  # of the result: each byte of an operand is multiplied as often
STEP_BYTES = 40 * 2**20  # of the 64 MiB of VMEM that v5p and TPU7x have, v5e and v6e 128
VMEM_BYTES = 56 * 2**20
ROWS = 256  # multiplied at a time with what the matrix unit holds


def matmul(a, b, out_dtype):
  check(a, b)
  a, b = vary(*(whole_steps(q) for q in (a, b)))
  (m, k), n, block = a.shape, b.shape[0], a.tile[1]
  rows, columns = min(TILE[0], up(m, 32)), min(TILE[1], up(n, LANES))
  chunks = chunks_of(k // block, block, rows, columns)
  grid = -(-m // rows), -(-n // columns), k // block // chunks
  steps = grid[2]

  def kernel(*refs):
    *operands, y, total = refs
    step = pl.program_id(2)
    clear(total, step == 0)
    accumulate(*operands, total, block, step * chunks)

    @pl.when(step == steps - 1)
    def _():
      y[...] = total[...].astype(out_dtype)

  of_scales = lambda step: step * chunks // LANES
  return pl.pallas_call(
    kernel,
    name="fp8_matmul",
    grid=grid,
    in_specs=[
      pl.BlockSpec((rows, chunks * block), lambda i, j, step: (i, step)),
      pl.BlockSpec((rows, LANES), lambda i, j, step: (i, of_scales(step))),
      pl.BlockSpec((columns, chunks * block), lambda i, j, step: (j, step)),
      pl.BlockSpec((scale_rows(k // block), columns), lambda i, j, step: (of_scales(step), j)),
    ],
    out_specs=pl.BlockSpec((rows, columns), lambda i, j, step: (i, j)),
    out_shape=like((m, n), out_dtype, a),
    scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * m * n * k,
      bytes_accessed=m * k * (grid[1] if steps > 1 else 1) + n * k * grid[0] + m * n * jnp.dtype(out_dtype).itemsize,
      transcendentals=0,
    ),
  )(a.values, scales_of_rows(a), b.values, scales_of_columns(b))


def check(a, b):
  """Raises Unsupported."""
  kind, block = device_kind(), a.tile[1]
  if kind.startswith(("TPU v2", "TPU v3", "TPU v4")):
    raise Unsupported(f"{kind} multiplies no float8_e4m3fn, TPU v5 and later do")
  tiles = a.tile[0] == 1 and b.tile[0] in (1, block) and block % LANES == 0
  if not tiles or (a.values.dtype, b.values.dtype) != (FP8, FP8):
    raise Unsupported(
      f"operands are {a.values.dtype} in tiles {a.tile} and {b.values.dtype} in tiles {b.tile}: the kernel for TPUs "
      f"multiplies float8_e4m3fn in tiles (1, block) by (block, block) or (1, block), block a multiple of {LANES}"
    )


def whole_steps(q):
  """`q` with zeros that fill the last of its tiles, and of many the last eight, so that steps of some tiles divide them."""
  q = whole(q)
  missing = -q.scales.shape[-1] % 8 if q.scales.shape[-1] > 32 else 0
  return QTensor(padded(q.values, -1, missing * q.tile[1]), padded(q.scales, -1, missing), q.tile)


def chunks_of(blocks, block, rows, columns):
  """Blocks of the contraction in a step: the most that divide `blocks`, fit in VMEM, and have their scales in one register."""
  most = STEP_BYTES // (2 * (rows + columns) * block)  # two steps' operands at a time
  fits = (n for n in range(min(blocks, most), 0, -1) if blocks % n == 0 and (blocks <= LANES or LANES % n == 0))
  return next(fits)


def scale_rows(blocks):
  return min(blocks, LANES)


def scales_of_rows(a):
  """[m, blocks], filled to whole registers."""
  return padded(a.scales, -1, -a.scales.shape[-1] % LANES)


def scales_of_columns(b):
  """Of each row of `b` [.., n, blocks], a column of the result: [.., blocks, n]."""
  return jnp.repeat(b.scales, b.tile[0], -2)[..., : b.shape[-2], :].mT


def clear(total, when):
  @pl.when(when)
  def _():
    total[...] = jnp.zeros_like(total)


def accumulate(a, of_rows, b, of_columns, total, block, first, span=None):
  """Adds to `total` [m, n] the product of `a` [m, k] and the transpose of `b` [n, k], scaled every `block` of k.

  Args:
    of_rows, of_columns: scales [m, blocks] and [blocks, n], of which those of this step start at `first`.
    span: (from, until) of k count, all by default.
  """
  together = math.gcd(a.shape[1] // block, 8)  # of which the compiler overlaps one with another
  width = together * block

  def chunk(c, span):
    column = c * block + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
    own = span and (column >= span[0]) & (column < span[1])
    some = span and (c * block < span[1]) & ((c + 1) * block > span[0])
    at, scale = pl.ds(pl.multiple_of(c * block, block), block), (first + c) % of_rows.shape[1]
    right, across = _kept(b[:, at], own), _kept(of_columns[pl.ds(scale, 1), :], some)
    for start in range(0, a.shape[0], ROWS):
      rows = slice(start, min(start + ROWS, a.shape[0]))
      left, down = _kept(a[rows, at], own), of_rows[rows, :]
      down = _kept(jnp.take_along_axis(down, jnp.full(down.shape, scale, jnp.int32), 1), some)  # along all lanes
      product = jax.lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
      total[rows, :] += product * jnp.concatenate([down] * (total.shape[1] // LANES), 1) * across

  def chunks(i, span):
    for c in range(together):
      chunk(i * together + c, span)

  def loop(i, _):
    if span is None:
      return chunks(i, None)
    inside = (i * width >= span[0]) & ((i + 1) * width <= span[1])
    pl.when(inside)(lambda: chunks(i, None))
    pl.when(jnp.logical_not(inside))(lambda: chunks(i, span))

  begin, end = (0, a.shape[1]) if span is None else span
  jax.lax.fori_loop(begin // width, -(-end // width), loop, None)


def _kept(x, own):
  """Zeros where not `own`, if that is given: a product with zero would keep a NaN."""
  if own is None:
    return x
  bits = x if x.dtype == jnp.float32 else pltpu.bitcast(x, jnp.int32)  # of FP8, four rows
  bits = jnp.where(own, bits, jnp.zeros_like(bits))
  return bits if x.dtype == jnp.float32 else pltpu.bitcast(bits, x.dtype)


def up(n, multiple):
  return -(-n // multiple) * multiple


def like(shape, dtype, q):
  """The type of a result that varies over devices as `q` does."""
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(q.values).manual_axis_type)
