"""What the self-test knows of each kernel: its inputs, smaller shapes to test, its work, and the error that passes.

Inputs are made by NumPy and copied to the device: programs that make them would have to be compiled.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np

from deepseek_jax.kernels.attention.api import count_visible_pairs
from deepseek_jax.kernels.implementations import Call
from deepseek_jax.kernels.qtensor import QTensor, tile_counts
from deepseek_jax.model.context_parallel import zigzag

# The largest sizes that are tested; larger calls are shrunk to them.
MAX_ROWS = 8192  # rows of activations, and k of a contraction over tokens
MAX_GROUPS = 8  # experts
MAX_HEADS, MAX_SEQ = 16, 4096  # query heads and keys, of one sequence
POOL_SIZE = 4_194_301  # random values that inputs repeat: a prime, so that no two rows of a matrix are equal


@dataclasses.dataclass(frozen=True)
class KernelSpec:
  """One row of KERNEL_SPECS, for calls with `arguments`, whose arrays are ShapeDtypeStructs.

  bounds: dtype of the first result -> largest error of any result that passes, see `check.relative_errors`.
  work: arguments -> FLOPs (`unit` "TFLOP/s") or bytes ("GB/s") of the forward and, with `gradients`, the backward pass.
  shrink: arguments -> those of a smaller call that is large enough to test.
  make_integers: arguments -> the same with arrays in place of abstract integers.
  gradients: of which arguments the gradients are tested too.
  largest_only: test only the largest of shapes that differ in no more than their number of full tiles.
  tile_magnitudes: inputs have magnitudes that differ from tile to tile. Not those of attention: its softmax would be
    all ones and zeros.
  """

  bounds: dict[str, float]
  work: Callable[..., float]
  shrink: Callable[..., tuple]
  make_integers: Callable[..., tuple] = lambda *arguments: arguments
  unit: str = "TFLOP/s"
  gradients: tuple[int, ...] = ()
  largest_only: bool = False
  tile_magnitudes: bool = True


def make_inputs(call: Call) -> tuple:
  """Arguments of `call` with NumPy arrays, no two of which are equal."""
  spec = KERNEL_SPECS[call.name]
  numbers = itertools.count()

  def draw(array: Any) -> Any:
    return draw_normal(array, next(numbers), spec.tile_magnitudes)

  def make_leaf(x):
    if isinstance(x, QTensor):
      values, scales = draw(x.values), draw(x.scales)
      return QTensor(values, np.abs(scales) + 1e-3, x.tile)
    return draw(x) if isinstance(x, jax.ShapeDtypeStruct) else x

  return jax.tree.map(make_leaf, spec.make_integers(*call.arguments), is_leaf=lambda x: isinstance(x, QTensor))


def draw_normal(array: jax.ShapeDtypeStruct, number: int = -1, tile_magnitudes: bool = False) -> np.ndarray:
  """Random normal values of the shape and dtype of `array`, different for each `number`; those of FP8 go up to 448.

  tile_magnitudes: runs of 128 values have log-normal factors, so that a scale used for another tile is a large error.
  """
  start = (number + 2) * 1_000_003 % POOL_SIZE
  return np.resize(np.roll(_normal_pool(np.dtype(array.dtype), tile_magnitudes), -start), array.shape)


@functools.cache
def _normal_pool(dtype: np.dtype, tile_magnitudes: bool) -> np.ndarray:
  """[POOL_SIZE] values."""
  rng = np.random.default_rng(0)
  values = rng.standard_normal(POOL_SIZE, np.float32)
  if tile_magnitudes:
    values *= np.repeat(np.exp(rng.standard_normal(POOL_SIZE // 128 + 1, np.float32)), 128)[:POOL_SIZE]
  if dtype == ml_dtypes.float8_e4m3fn:
    values = np.clip(100 * values, -448, 448)
  return values.astype(dtype)


def uneven_groups(groups: int, rows: int, multiple: int = 8) -> np.ndarray:
  """[groups] int32 multiples of `multiple`.

  One group is empty if there are at least four. Some rows belong to no group.
  """
  rng = np.random.default_rng(0)
  weights = np.exp(0.5 * rng.standard_normal(groups))
  if groups >= 4:
    weights[groups // 2] = 0
  sizes = 0.95 * rows * weights / weights.sum()
  return (sizes // multiple * multiple).astype(np.int32)


def packed_segment_ids(batch: int, seq: int) -> np.ndarray:
  """[batch, seq] int32 segment ids of packed documents of unequal lengths."""
  ends = np.cumsum(np.random.default_rng(0).integers(1, max(seq // 3, 2), seq))
  return np.broadcast_to(np.searchsorted(ends, np.arange(seq), side="right").astype(np.int32), (batch, seq)).copy()


def resize(x: Any, *sizes: int) -> Any:
  """`x`, a ShapeDtypeStruct or a QTensor of them, with last dimensions of these sizes; scales of a QTensor follow."""
  shape = (*x.shape[: len(x.shape) - len(sizes)], *sizes)
  if not isinstance(x, QTensor):
    return jax.ShapeDtypeStruct(shape, x.dtype)
  values: Any = jax.ShapeDtypeStruct(shape, x.values.dtype)
  scales: Any = jax.ShapeDtypeStruct((*shape[:-2], *tile_counts(shape, x.tile)), x.scales.dtype)
  return QTensor(values, scales, x.tile)


def cap_size(size: int, limit: int) -> int:
  """`size`, or where it is above `limit`, `limit` and the remainder of `size` beyond full tiles of 128."""
  return size if size <= limit else limit + size % 128


# attention(q, k, v, segment_ids, scale, window): [batch, seq, heads, width].


def _shrink_heads(q, k, v):
  group = q.shape[2] // k.shape[2]
  kv_heads = min(k.shape[2], max(MAX_HEADS // group, 1))
  return kv_heads * group, kv_heads


def _shrink_window(window, seq):
  """`window`, or so much of it that a shorter sequence still has masked blocks."""
  return min(window, seq // 2)


def _shrink_attention(q, k, v, segment_ids, scale, window):
  (heads, kv_heads), seq = _shrink_heads(q, k, v), cap_size(q.shape[1], MAX_SEQ)
  q, k, v = (
    jax.ShapeDtypeStruct((1, seq, n, x.shape[3]), x.dtype) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads))
  )
  segment_ids = None if segment_ids is None else resize(segment_ids, 1, seq)
  return q, k, v, segment_ids, scale, _shrink_window(window, seq)


def _shrink_attention_of_part(q, k, v, segment_ids, scale, window, positions, shard):
  heads, kv_heads = _shrink_heads(q, k, v)
  if k.shape[1] > MAX_SEQ:
    positions = zigzag(MAX_SEQ, len(positions))
  shards, queries = positions.shape
  q = jax.ShapeDtypeStruct((1, queries, heads, q.shape[3]), q.dtype)
  k, v = (jax.ShapeDtypeStruct((1, shards * queries, kv_heads, x.shape[3]), x.dtype) for x in (k, v))
  if segment_ids is not None:
    segment_ids = tuple(resize(ids, 1, x.shape[1]) for ids, x in zip(segment_ids, (q, k), strict=True))
  return q, k, v, segment_ids, scale, _shrink_window(window, k.shape[1]), positions, shard


def _attention_integers(q, k, v, segment_ids, scale, window):
  return q, k, v, None if segment_ids is None else packed_segment_ids(*segment_ids.shape), scale, window


def _attention_of_part_integers(q, k, v, segment_ids, scale, window, positions, shard):
  shard = len(positions) - 1
  if segment_ids is not None:
    keys = packed_segment_ids(*segment_ids[1].shape)
    segment_ids = keys[:, positions[shard]], keys
  return q, k, v, segment_ids, scale, window, positions, np.int32(shard)


def _attention_flops(q, k, v, segment_ids, scale, window, *_):
  """Causal: half of the pairs, or the window's.

  Forward q k and p v; backward the scores again, their gradient, and those of q, k and v.
  """
  pairs = q.shape[0] * q.shape[2] * q.shape[1] * (count_visible_pairs(k.shape[1], window) / k.shape[1])
  return 2 * pairs * (4 * q.shape[3] + 3 * v.shape[3])


# fp8_matmul.matmul(a, b, out_dtype): a [m, k], b [n, k]; tokens are rows of a, or of a wgrad the contraction of both.


def _shrink_fp8_matmul(a, b, out_dtype):
  (m, k), n = a.shape, b.shape[0]
  if b.tile[0] == 1:
    k = cap_size(k, MAX_ROWS)
  else:
    m = cap_size(m, MAX_ROWS)
  return resize(a, m, k), resize(b, n, k), out_dtype


def _fp8_matmul_flops(a, b, out_dtype):
  return 2 * a.shape[0] * a.shape[1] * b.shape[0]


# fp8_grouped_matmul: matmul(a [rows, k], b [groups, n, k], group_sizes, step, out_dtype);
# wgrad(a [m, rows], b [n, rows], ..).


def _shrink_groups(group_sizes, rows):
  """(sizes, rows) of fewer groups, each with as many rows on average unless that is too many."""
  groups = group_sizes.shape[0]
  fewer = min(groups, MAX_GROUPS)
  rows = rows if fewer == groups else -(-rows * fewer // groups // 128) * 128
  return jax.ShapeDtypeStruct((fewer,), group_sizes.dtype), cap_size(rows, MAX_ROWS)


def _shrink_fp8_grouped_matmul(a, b, group_sizes, step, out_dtype):
  sizes, rows = _shrink_groups(group_sizes, a.shape[0])
  return resize(a, rows, a.shape[1]), resize(b, *sizes.shape, *b.shape[1:]), sizes, step, out_dtype


def _shrink_fp8_grouped_wgrad(a, b, group_sizes, step, out_dtype):
  sizes, rows = _shrink_groups(group_sizes, a.shape[1])
  return resize(a, a.shape[0], rows), resize(b, b.shape[0], rows), sizes, step, out_dtype


def _fp8_grouped_matmul_integers(a, b, group_sizes, step, out_dtype):
  return a, b, uneven_groups(group_sizes.shape[0], a.shape[0]), step, out_dtype


def _fp8_grouped_wgrad_integers(a, b, group_sizes, step, out_dtype):
  return a, b, uneven_groups(group_sizes.shape[0], a.shape[1]), step, out_dtype


def _fp8_grouped_matmul_flops(a, b, group_sizes, *_):
  rows = uneven_groups(group_sizes.shape[0], a.shape[0]).sum()
  return 2 * float(rows) * a.shape[1] * b.shape[1]


def _fp8_grouped_wgrad_flops(a, b, group_sizes, *_):
  rows = uneven_groups(group_sizes.shape[0], a.shape[1]).sum()
  return 2 * float(rows) * a.shape[0] * b.shape[0]


# grouped_matmul(x [rows, k], w [groups, k, n], group_sizes, block).


def _shrink_grouped_matmul(x, w, group_sizes, block):
  sizes, rows = _shrink_groups(group_sizes, x.shape[0])
  rows = -(-rows // block) * block
  return resize(x, rows, x.shape[1]), resize(w, *sizes.shape, *w.shape[1:]), sizes, block


def _grouped_matmul_integers(x, w, group_sizes, block):
  return x, w, uneven_groups(group_sizes.shape[0], x.shape[0], block), block


def _grouped_matmul_flops(x, w, group_sizes, block):
  """Forward, and backward twice that."""
  rows = uneven_groups(group_sizes.shape[0], x.shape[0], block).sum()
  return 6 * float(rows) * x.shape[1] * w.shape[2]


# quantize(x [.., rows, columns], tile, pow2_scales), quantize_both(x, block, pow2_scales),
# swiglu_quantize(gate, up, block, pow2_scales).


def _shrink_quantize(x, *options):
  leading = (1,) * (x.ndim - 2)
  return resize(x, *leading, cap_size(x.shape[-2], MAX_ROWS), x.shape[-1]), *options


def _shrink_swiglu(gate, up, *options):
  return *_shrink_quantize(gate), *_shrink_quantize(up), *options


def _quantize_bytes(inputs, copies):
  """Bytes of kernels that read `inputs` arrays and write `copies` FP8 values of each element; scales are left out."""

  def work(x, *_):
    return math.prod(x.shape) * (inputs * np.dtype(x.dtype).itemsize + copies)

  return work


# The kernel and XLA may round ties to different neighbors in FP8: of bfloat16 inputs several in a hundred are ties.
QUANTIZE_BOUNDS = {"float8_e4m3fn": 0.04}
# Of results in float32: Hopper accumulates 32 products of FP8 in about 14 bits (V3 report, section 3.3.2).
MATMUL_BOUNDS = {"bfloat16": 2.0**-8, "float32": 1e-3}
ATTENTION_BOUNDS = {"bfloat16": 2.0**-6, "float32": 1e-3}
KERNEL_SPECS = {
  "attention.attention": KernelSpec(
    ATTENTION_BOUNDS,
    _attention_flops,
    _shrink_attention,
    _attention_integers,
    gradients=(0, 1, 2),
    tile_magnitudes=False,
  ),
  "attention.attention_of_part": KernelSpec(
    ATTENTION_BOUNDS,
    _attention_flops,
    _shrink_attention_of_part,
    _attention_of_part_integers,
    gradients=(0, 1, 2),
    tile_magnitudes=False,
  ),
  "grouped_matmul.grouped_matmul": KernelSpec(
    {"bfloat16": 2.0**-7, "float32": 1e-4},
    _grouped_matmul_flops,
    _shrink_grouped_matmul,
    _grouped_matmul_integers,
    gradients=(0, 1),
  ),
  "fp8_matmul.matmul": KernelSpec(MATMUL_BOUNDS, _fp8_matmul_flops, _shrink_fp8_matmul),
  "fp8_grouped_matmul.matmul": KernelSpec(
    MATMUL_BOUNDS, _fp8_grouped_matmul_flops, _shrink_fp8_grouped_matmul, _fp8_grouped_matmul_integers
  ),
  "fp8_grouped_matmul.wgrad": KernelSpec(
    MATMUL_BOUNDS, _fp8_grouped_wgrad_flops, _shrink_fp8_grouped_wgrad, _fp8_grouped_wgrad_integers
  ),
  "quantize.quantize": KernelSpec(
    QUANTIZE_BOUNDS, _quantize_bytes(1, 1), _shrink_quantize, unit="GB/s", largest_only=True
  ),
  "quantize.quantize_both": KernelSpec(
    QUANTIZE_BOUNDS, _quantize_bytes(1, 2), _shrink_quantize, unit="GB/s", largest_only=True
  ),
  "swiglu.swiglu_quantize": KernelSpec(
    QUANTIZE_BOUNDS, _quantize_bytes(2, 2), _shrink_swiglu, unit="GB/s", largest_only=True
  ),
}
