"""jax's splash attention: blocks of scores stay on the chip, forward and backward, and future blocks are skipped."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from deepseek_jax.kernels.implementations import match_vma
from deepseek_jax.kernels.libraries import tpu_library

BLOCK = 512  # of queries and of keys: maxtext's default; not measured by us

# Matmuls of each kernel that have the width of keys, and of values: forward q k and p v; backward the scores again, for
# the gradient of queries and once more for those of keys and values.
MATMULS = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}


def attention(
  q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, scale: float, window: int
) -> jax.Array:
  q_kv_segment_ids = None if segment_ids is None else (segment_ids, segment_ids)
  return attention_of_part(q, k, v, q_kv_segment_ids, scale, window, np.arange(q.shape[1], dtype=np.int32)[None], 0)


def attention_of_part(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: tuple[jax.Array, jax.Array] | None,
  scale: float,
  window: int,
  positions: np.ndarray,
  shard: int | jax.Array,
) -> jax.Array:
  (shards, queries), seq = positions.shape, k.shape[1]
  splash = tpu_library("splash_attention.splash_attention_kernel", q.dtype.name, _splash_cost(window))
  q_block, kv_block = _block_sizes(queries, seq)
  sizes = splash.BlockSizes(*[q_block, kv_block, kv_block] * 2, q_block, kv_block)
  mask = masks.LocalMask((seq, seq), (window - 1, 0), 0) if window else masks.CausalMask((seq, seq))
  mask.q_sequence = positions.reshape(-1)
  kernel = splash.make_splash_mha(masks.MultiHeadMask([mask]), block_sizes=sizes, head_shards=1, q_seq_shards=shards)
  if shards > 1:  # the shard's blocks of the mask [1, q blocks, kv blocks], and its positions

    def slice_shard(x):
      axis = 1 if x.ndim == 3 else 0
      return jax.lax.dynamic_slice_in_dim(x, shard * (x.shape[axis] // shards), x.shape[axis] // shards, axis)

    kernel = jax.tree.map(slice_shard, kernel)
  q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # the kernel has no scale
  q, k, v, segment_ids = match_vma(*(x.swapaxes(1, 2) for x in (q, k, v)), segment_ids)  # [batch, heads, seq, width]
  return jax.vmap(kernel)(q, k, v, segment_ids and splash.SegmentIds(*segment_ids)).swapaxes(1, 2)


def _block_sizes(queries, seq):
  """(queries, keys) of a block."""
  return math.gcd(queries, BLOCK), math.gcd(seq, BLOCK)


def _visible_blocks(queries, seq, q_block, kv_block, window):
  """Blocks of scores of a head that are not masked as a whole. A shard of a sequence has this many on average."""
  if not window:
    return queries // q_block * (seq // kv_block + 1) / 2
  first = np.arange(0, seq, q_block)  # queries of the blocks, and the blocks of the keys that they see
  blocks = (first + q_block - 1) // kv_block - np.maximum(first - window + 1, 0) // kv_block + 1
  return int(blocks.sum()) * queries / seq


@functools.cache  # so that `tpu_library` knows it again
def _splash_cost(window):
  return functools.partial(_cost, window)


def _cost(window, call, operands, results):
  """The cost of one kernel, for all heads of a sequence.

  It computes the blocks of scores that are not masked. For each it reads one more block of keys and values, or of
  queries and gradients. Its other operands and results are read and written once a head.
  """
  q, k, v = operands[3:6]  # [heads, positions, width]
  q_block, kv_block = _block_sizes(q.shape[1], k.shape[1])
  blocks = int(q.shape[0] * _visible_blocks(q.shape[1], k.shape[1], q_block, kv_block, window))
  key_matmuls, value_matmuls = next(n for phase, n in MATMULS.items() if f"_{phase}_" in call["name"])
  head_bytes = [
    x.size // (x.shape[0] if x.ndim == 3 else 1) * x.dtype.itemsize for x in jax.tree.leaves((operands[3:], results))
  ]
  return pl.CostEstimate(
    flops=2 * blocks * q_block * kv_block * (key_matmuls * q.shape[2] + value_matmuls * v.shape[2]),
    transcendentals=blocks * q_block * kv_block,
    bytes_accessed=q.shape[0] * sum(head_bytes) + blocks * kv_block * (q.shape[2] + v.shape[2]) * q.dtype.itemsize,
  )
