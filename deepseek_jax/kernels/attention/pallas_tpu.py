"""jax's splash attention: blocks of scores stay on the chip, forward and backward, and those after the queries are passed over."""

import math

import jax
import jax.numpy as jnp
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
  if q.dtype not in (jnp.bfloat16, jnp.float32):
    raise Unsupported(f"splash attention is for bfloat16 and float32, not {q.dtype}")
  seq = q.shape[1]
  if seq % LANES:
    raise Unsupported(f"splash attention is for sequences of a multiple of {LANES} positions, not {seq}")
  splash = library("splash_attention.splash_attention_kernel", q.dtype.name, _cost)
  block = math.gcd(seq, BLOCK)
  sizes = splash.BlockSizes(*[block] * 8)
  mask = masks.MultiHeadMask([masks.CausalMask((seq, seq))])
  kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
  q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # there is no scale inside
  q, k, v, segment_ids = vary(*(x.swapaxes(1, 2) for x in (q, k, v)), segment_ids)  # [batch, heads, seq, width]
  of_each = segment_ids if segment_ids is None else splash.SegmentIds(segment_ids, segment_ids)
  return jax.vmap(kernel)(q, k, v, of_each).swapaxes(1, 2)


def _cost(call, operands, results):
  """Of one kernel, for all heads of a sequence: it makes the blocks of scores with a key that is seen, and reads for each
  one more block of keys and values, or of queries and gradients; what else it takes and gives is per head."""
  q, k, v = operands[3:6]  # [heads, seq, width]
  heads, seq, block = *q.shape[:2], math.gcd(q.shape[1], BLOCK)
  blocks = heads * seq // block * (k.shape[1] // block + 1) // 2
  of_keys, of_values = next(n for phase, n in PRODUCTS.items() if f"_{phase}_" in call["name"])
  widths = (of_keys * q.shape[2] + of_values * v.shape[2]), q.shape[2] + v.shape[2]
  per_head = [
    x.size // (x.shape[0] if x.ndim == 3 else 1) * x.dtype.itemsize for x in jax.tree.leaves((operands[3:], results))
  ]
  return pl.CostEstimate(
    flops=2 * blocks * block**2 * widths[0],
    transcendentals=blocks * block**2,
    bytes_accessed=heads * sum(per_head) + blocks * block * widths[1] * q.dtype.itemsize,
  )
