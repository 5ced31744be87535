"""What the self-test knows of each kernel: inputs for it, a slice of large ones, its work, and how far it may be from XLA's form.

Inputs are made by NumPy and copied to the device, since each program that makes them would have to be compiled.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np

from deepseek_jax.kernels.implementations import Call
from deepseek_jax.kernels.qtensor import QTensor, tiles_of
from deepseek_jax.model.context import zigzag

ROWS = 8192  # most rows of activations that are tested, and most terms of a contraction over tokens
GROUPS = 8  # most experts
HEADS, SEQ = 16, 4096  # most query heads and keys; one sequence
PERIOD = 4_194_301  # values that are drawn: a prime, so that no two rows of a matrix are equal


@dataclasses.dataclass(frozen=True)
class Operation:
  """One row of OPERATIONS, for calls with `arguments`, whose arrays are ShapeDtypeStructs.

  bounds: dtype of the first result -> greatest error of any result, see `check.relative_errors`.
  work: arguments -> FLOPs (`unit` "TFLOP/s") or bytes ("GB/s") of the forward and, with `gradients`, the backward pass.
  cut: arguments -> those of a slice that is large enough.
  integers: arguments -> the same with arrays in place of abstract integers.
  gradients: of which arguments the gradients are tested too.
  merge: test only the largest of shapes that differ in no more than their number of whole tiles.
  spread: inputs have magnitudes that differ from tile to tile. Not those of attention: its softmax would be all ones and zeros.
  """

  bounds: dict[str, float]
  work: Callable[..., float]
  cut: Callable[..., tuple]
  integers: Callable[..., tuple] = lambda *arguments: arguments
  unit: str = "TFLOP/s"
  gradients: tuple[int, ...] = ()
  merge: bool = False
  spread: bool = True


def make_inputs(call: Call) -> tuple:
  """Arguments of `call` with NumPy arrays, no two of which are equal."""
  operation = OPERATIONS[call.name]
  numbers = itertools.count()

  def leaf(x):
    if isinstance(x, QTensor):
      values, scales = (draw(part, next(numbers), operation.spread) for part in (x.values, x.scales))
      return QTensor(values, np.abs(scales) + 1e-3, x.tile)
    return draw(x, next(numbers), operation.spread) if isinstance(x, jax.ShapeDtypeStruct) else x

  return jax.tree.map(leaf, operation.integers(*call.arguments), is_leaf=lambda x: isinstance(x, QTensor))


def draw(array: jax.ShapeDtypeStruct, number: int = -1, spread: bool = False) -> np.ndarray:
  """Random normal values of its shape and dtype, other ones for each `number`; of FP8 up to 448.

  spread: runs of 128 values have log-normal factors, so that a scale used for another tile is a large error.
  """
  start = (number + 2) * 1_000_003 % PERIOD
  return np.resize(np.roll(_drawn(np.dtype(array.dtype), spread), -start), array.shape)


@functools.cache
def _drawn(dtype, spread) -> np.ndarray:
  """[PERIOD] values."""
  rng = np.random.default_rng(0)
  values = rng.standard_normal(PERIOD, np.float32)
  if spread:
    values *= np.repeat(np.exp(rng.standard_normal(PERIOD // 128 + 1, np.float32)), 128)[:PERIOD]
  if dtype == ml_dtypes.float8_e4m3fn:
    values = np.clip(100 * values, -448, 448)
  return values.astype(dtype)


def uneven_groups(groups: int, rows: int, multiple: int = 8) -> np.ndarray:
  """[groups] int32 sizes, multiples of `multiple`: one group is empty where there are four or more, and some rows have none."""
  rng = np.random.default_rng(0)
  weights = np.exp(0.5 * rng.standard_normal(groups))
  if groups >= 4:
    weights[groups // 2] = 0
  sizes = 0.95 * rows * weights / weights.sum()
  return (sizes // multiple * multiple).astype(np.int32)


def documents(batch: int, seq: int) -> np.ndarray:
  """[batch, seq] int32 segment ids of packed documents of unequal lengths."""
  ends = np.cumsum(np.random.default_rng(0).integers(1, max(seq // 3, 2), seq))
  return np.broadcast_to(np.searchsorted(ends, np.arange(seq), side="right").astype(np.int32), (batch, seq)).copy()


def resized(x, *sizes: int):
  """`x`, abstract, with last dimensions of these sizes; of a QTensor the scales follow."""
  shape = (*x.shape[: len(x.shape) - len(sizes)], *sizes)
  if not isinstance(x, QTensor):
    return jax.ShapeDtypeStruct(shape, x.dtype)
  scales = (*shape[:-2], *tiles_of(shape, x.tile))
  return QTensor(jax.ShapeDtypeStruct(shape, x.values.dtype), jax.ShapeDtypeStruct(scales, x.scales.dtype), x.tile)


def at_most(size: int, most: int) -> int:
  """`size`, or where it is larger `most` and as many more as `size` has beyond whole tiles of 128."""
  return size if size <= most else most + size % 128


# attention(q, k, v, segment_ids, scale): [batch, seq, heads, width].


def _cut_heads(q, k, v):
  group = q.shape[2] // k.shape[2]
  kv_heads = min(k.shape[2], max(HEADS // group, 1))
  return kv_heads * group, kv_heads


def _cut_attention(q, k, v, segment_ids, scale):
  (heads, kv_heads), seq = _cut_heads(q, k, v), at_most(q.shape[1], SEQ)
  q, k, v = (
    jax.ShapeDtypeStruct((1, seq, n, x.shape[3]), x.dtype) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads))
  )
  return q, k, v, None if segment_ids is None else resized(segment_ids, 1, seq), scale


def _cut_part(q, k, v, segment_ids, scale, positions, part):
  heads, kv_heads = _cut_heads(q, k, v)
  if k.shape[1] > SEQ:
    positions = zigzag(SEQ, len(positions))
  parts, queries = positions.shape
  q = jax.ShapeDtypeStruct((1, queries, heads, q.shape[3]), q.dtype)
  k, v = (jax.ShapeDtypeStruct((1, parts * queries, kv_heads, x.shape[3]), x.dtype) for x in (k, v))
  if segment_ids is not None:
    segment_ids = tuple(resized(ids, 1, x.shape[1]) for ids, x in zip(segment_ids, (q, k), strict=True))
  return q, k, v, segment_ids, scale, positions, part


def _attention_ids(q, k, v, segment_ids, scale):
  return q, k, v, None if segment_ids is None else documents(*segment_ids.shape), scale


def _part_ids(q, k, v, segment_ids, scale, positions, part):
  part = len(positions) - 1
  if segment_ids is not None:
    keys = documents(*segment_ids[1].shape)
    segment_ids = keys[:, positions[part]], keys
  return q, k, v, segment_ids, scale, positions, np.int32(part)


def _attention_flops(q, k, v, *_):
  """Causal: half of the pairs. Forward q k and p v; backward the scores again, their gradient, and those of q, k and v."""
  pairs = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1] / 2
  return 2 * pairs * (4 * q.shape[3] + 3 * v.shape[3])


# fp8_matmul.matmul(a, b, out_dtype): a [m, k], b [n, k]; tokens are rows of a, or of a wgrad the contraction of both.


def _cut_fp8_matmul(a, b, out_dtype):
  (m, k), n = a.shape, b.shape[0]
  if b.tile[0] == 1:
    k = at_most(k, ROWS)
  else:
    m = at_most(m, ROWS)
  return resized(a, m, k), resized(b, n, k), out_dtype


def _fp8_matmul_flops(a, b, out_dtype):
  return 2 * a.shape[0] * a.shape[1] * b.shape[0]


# fp8_grouped_matmul: matmul(a [rows, k], b [groups, n, k], group_sizes, step, out_dtype); wgrad(a [m, rows], b [n, rows], ..).


def _cut_groups(group_sizes, rows):
  """(sizes, rows) of fewer groups, each with as many rows on average unless that is too many."""
  groups = group_sizes.shape[0]
  kept = min(groups, GROUPS)
  rows = rows if kept == groups else -(-rows * kept // groups // 128) * 128
  return jax.ShapeDtypeStruct((kept,), group_sizes.dtype), at_most(rows, ROWS)


def _cut_grouped(a, b, group_sizes, step, out_dtype):
  sizes, rows = _cut_groups(group_sizes, a.shape[0])
  return resized(a, rows, a.shape[1]), resized(b, *sizes.shape, *b.shape[1:]), sizes, step, out_dtype


def _cut_grouped_wgrad(a, b, group_sizes, step, out_dtype):
  sizes, rows = _cut_groups(group_sizes, a.shape[1])
  return resized(a, a.shape[0], rows), resized(b, b.shape[0], rows), sizes, step, out_dtype


def _grouped_ids(a, b, group_sizes, step, out_dtype):
  return a, b, uneven_groups(group_sizes.shape[0], a.shape[0]), step, out_dtype


def _grouped_wgrad_ids(a, b, group_sizes, step, out_dtype):
  return a, b, uneven_groups(group_sizes.shape[0], a.shape[1]), step, out_dtype


def _grouped_flops(a, b, group_sizes, *_):
  rows = uneven_groups(group_sizes.shape[0], a.shape[0]).sum()
  return 2 * float(rows) * a.shape[1] * b.shape[1]


def _grouped_wgrad_flops(a, b, group_sizes, *_):
  rows = uneven_groups(group_sizes.shape[0], a.shape[1]).sum()
  return 2 * float(rows) * a.shape[0] * b.shape[0]


# grouped_matmul(x [rows, k], w [groups, k, n], group_sizes, block).


def _cut_matmul(x, w, group_sizes, block):
  sizes, rows = _cut_groups(group_sizes, x.shape[0])
  rows = -(-rows // block) * block
  return resized(x, rows, x.shape[1]), resized(w, *sizes.shape, *w.shape[1:]), sizes, block


def _matmul_ids(x, w, group_sizes, block):
  return x, w, uneven_groups(group_sizes.shape[0], x.shape[0], block), block


def _matmul_flops(x, w, group_sizes, block):
  """Forward, and backward twice that."""
  rows = uneven_groups(group_sizes.shape[0], x.shape[0], block).sum()
  return 6 * float(rows) * x.shape[1] * w.shape[2]


# quantize(x [.., rows, columns], tile, pow2_scales), quantize_both(x, block, pow2_scales), swiglu_quantize(gate, up, block, pow2_scales).


def _cut_rows(x, *rest):
  leading = (1,) * (x.ndim - 2)
  return resized(x, *leading, at_most(x.shape[-2], ROWS), x.shape[-1]), *rest


def _cut_swiglu(gate, up, *rest):
  return *_cut_rows(gate), *_cut_rows(up), *rest


def _quantized_bytes(read, copies):
  """Reads `read` bytes a value, writes `copies` FP8 values of it; scales are left out."""
  return lambda x, *_: math.prod(x.shape) * (read * np.dtype(x.dtype).itemsize + copies)


# The two compared roundings to FP8 may take ties to different neighbours: of bfloat16 inputs several in a hundred are ties.
ROUNDED = {"float8_e4m3fn": 0.04}
# Of matmuls with results in float32: Hopper adds up 32 products of FP8 in about 14 bits (V3 report, section 3.3.2).
MATMUL = {"bfloat16": 2.0**-8, "float32": 1e-3}
ATTENTION = {"bfloat16": 2.0**-6, "float32": 1e-3}
OPERATIONS = {
  "attention.attention": Operation(
    ATTENTION, _attention_flops, _cut_attention, _attention_ids, gradients=(0, 1, 2), spread=False
  ),
  "attention.attention_of_part": Operation(
    ATTENTION, _attention_flops, _cut_part, _part_ids, gradients=(0, 1, 2), spread=False
  ),
  "grouped_matmul.grouped_matmul": Operation(
    {"bfloat16": 2.0**-7, "float32": 1e-4}, _matmul_flops, _cut_matmul, _matmul_ids, gradients=(0, 1)
  ),
  "fp8_matmul.matmul": Operation(MATMUL, _fp8_matmul_flops, _cut_fp8_matmul),
  "fp8_grouped_matmul.matmul": Operation(MATMUL, _grouped_flops, _cut_grouped, _grouped_ids),
  "fp8_grouped_matmul.wgrad": Operation(MATMUL, _grouped_wgrad_flops, _cut_grouped_wgrad, _grouped_wgrad_ids),
  "quantize.quantize": Operation(ROUNDED, _quantized_bytes(1, 1), _cut_rows, unit="GB/s", merge=True),
  "quantize.quantize_both": Operation(ROUNDED, _quantized_bytes(1, 2), _cut_rows, unit="GB/s", merge=True),
  "swiglu.swiglu_quantize": Operation(ROUNDED, _quantized_bytes(2, 2), _cut_swiglu, unit="GB/s", merge=True),
}
