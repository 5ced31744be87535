"""jax's splash attention: blocks of scores stay on the chip, forward and backward, and those after the queries are passed over."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from deepseek_jax.kernels.implementations import Unsupported, vary
from deepseek_jax.kernels.libraries import library

LANES = 128
BLOCK = 512  # of queries and of keys: maxtext's default; not measured by us

# Products of each kernel that have the width of keys, and of values: forward q k and p v; backward the scores again, for the
# gradient of queries and once more for those of keys and values.
PRODUCTS = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}


def attention(q, k, v, segment_ids, scale):
  both = None if segment_ids is None else (segment_ids, segment_ids)
  return attention_of_part(q, k, v, both, scale, np.arange(q.shape[1], dtype=np.int32)[None], 0)


def attention_of_part(q, k, v, segment_ids, scale, positions, part):
  (parts, queries), seq = positions.shape, k.shape[1]
  if q.dtype not in (jnp.bfloat16, jnp.float32):
    raise Unsupported(f"splash attention is for bfloat16 and float32, not {q.dtype}")
  if queries % LANES:
    raise Unsupported(f"splash attention is for a multiple of {LANES} positions on each device, not {queries}")
  splash = library("splash_attention.splash_attention_kernel", q.dtype.name, _cost)
  of_queries, of_keys = _blocks(queries, seq)
  sizes = splash.BlockSizes(*[of_queries, of_keys, of_keys] * 2, of_queries, of_keys)
  mask = masks.CausalMask((seq, seq))
  mask.q_sequence = positions.reshape(-1)
  kernel = splash.make_splash_mha(masks.MultiHeadMask([mask]), block_sizes=sizes, head_shards=1, q_seq_shards=parts)
  if parts > 1:  # of each part its blocks [1, of queries, of keys], and its positions
    own = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, part * (x.shape[axis] // parts), x.shape[axis] // parts, axis)
    kernel = jax.tree.map(lambda x: own(x, 1 if x.ndim == 3 else 0), kernel)
  q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # there is no scale inside
  q, k, v, segment_ids = vary(*(x.swapaxes(1, 2) for x in (q, k, v)), segment_ids)  # [batch, heads, seq, width]
  return jax.vmap(kernel)(q, k, v, segment_ids and splash.SegmentIds(*segment_ids)).swapaxes(1, 2)


def _blocks(queries, seq):
  return math.gcd(queries, BLOCK), math.gcd(seq, BLOCK)


def _cost(call, operands, results):
  """Of one kernel, for all heads of a sequence: it makes the blocks of scores with a key that is seen, and reads for each
  one more block of keys and values, or of queries and gradients; what else it takes and gives is per head."""
  q, k, v = operands[3:6]  # [heads, positions, width]
  of_queries, of_keys = _blocks(q.shape[1], k.shape[1])
  blocks = (
    q.shape[0] * (q.shape[1] // of_queries) * (k.shape[1] // of_keys + 1) // 2
  )  # of all parts of a sequence on average
  with_keys, with_values = next(n for phase, n in PRODUCTS.items() if f"_{phase}_" in call["name"])
  per_head = [
    x.size // (x.shape[0] if x.ndim == 3 else 1) * x.dtype.itemsize for x in jax.tree.leaves((operands[3:], results))
  ]
  return pl.CostEstimate(
    flops=2 * blocks * of_queries * of_keys * (with_keys * q.shape[2] + with_values * v.shape[2]),
    transcendentals=blocks * of_queries * of_keys,
    bytes_accessed=q.shape[0] * sum(per_head) + blocks * of_keys * (q.shape[2] + v.shape[2]) * q.dtype.itemsize,
  )
