"""Attention by blocks of queries, for CPUs: each block meets only the keys that one of its queries may see.

All scores of a sequence do not fit a core's cache, and half of them are masked: see docs/explanation/kernels.md.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.implementations import accumulation, match_vma

MIN_ROWS = 128  # smaller blocks are not faster
MAX_BLOCKS = 8  # each adds to the time of compilation


def attention(
  q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, scale: float, window: int
) -> jax.Array:
  """`attention` of kernels/attention/api.py. The backward pass makes the scores again."""
  batch, seq, heads, width = q.shape
  q, k, v = match_vma(q, k, v)
  q = q.reshape(batch, seq, k.shape[2], -1, width).transpose(0, 2, 3, 1, 4)  # [batch, kv_heads, group, seq, width]
  k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [batch, kv_heads, seq, width]
  y = _attention(q, k, v, segment_ids, scale, window)  # [batch, kv_heads, group, seq, value width]
  return y.transpose(0, 3, 1, 2, 4).reshape(batch, seq, heads, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q, k, v, segment_ids, scale, window):
  return _attention_fwd(q, k, v, segment_ids, scale, window)[0]


def _attention_fwd(q, k, v, segment_ids, scale, window):
  outputs, log_normalizers = [], []
  for rows, keys in _blocks(q.shape[3], window):
    logits = _masked_logits(q, k, segment_ids, scale, window, rows, keys)  # [batch, kv_heads, group, rows, keys]
    max_logit = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - max_logit)
    normalizer = weights.sum(-1, keepdims=True)
    numerator = _einsum("bhgqs,bhsv->bhgqv", weights.astype(v.dtype), v[:, :, keys])
    outputs.append((numerator / normalizer).astype(v.dtype))
    log_normalizers.append(max_logit + jnp.log(normalizer))
  y, log_normalizer = jnp.concatenate(outputs, 3), jnp.concatenate(log_normalizers, 3)
  return y, (q, k, v, segment_ids, y, log_normalizer)


def _attention_bwd(scale, window, residuals, dy):
  q, k, v, segment_ids, y, log_normalizer = residuals
  dtype = log_normalizer.dtype
  # The inner product of the softmax with its gradient, [batch, kv_heads, group, seq, 1] (FlashAttention, section 3.1).
  inner = (dy.astype(dtype) * y.astype(dtype)).sum(-1, keepdims=True)
  dq, dk, dv = [], 0 * k.astype(dtype), 0 * v.astype(dtype)
  for rows, keys in _blocks(q.shape[3], window):
    logits = _masked_logits(q, k, segment_ids, scale, window, rows, keys)
    probabilities = jnp.exp(logits - log_normalizer[..., rows, :])  # [batch, kv_heads, group, rows, keys]
    dy_rows = dy[..., rows, :]
    dv = dv.at[:, :, keys].add(_einsum("bhgqs,bhgqv->bhsv", probabilities.astype(v.dtype), dy_rows))
    d_probabilities = _einsum("bhgqv,bhsv->bhgqs", dy_rows, v[:, :, keys])
    d_logits = (scale * probabilities * (d_probabilities - inner[..., rows, :])).astype(q.dtype)
    dq.append(_einsum("bhgqs,bhsk->bhgqk", d_logits, k[:, :, keys]).astype(q.dtype))
    dk = dk.at[:, :, keys].add(_einsum("bhgqs,bhgqk->bhsk", d_logits, q[..., rows, :]))
  return jnp.concatenate(dq, 3), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _blocks(seq: int, window: int) -> Iterator[tuple[slice, slice]]:
  """(queries of a block, keys that they may see)."""
  size = max(MIN_ROWS, -(-seq // MAX_BLOCKS))
  for start in range(0, seq, size):
    stop = min(start + size, seq)
    yield slice(start, stop), slice(max(0, start - window + 1) if window else 0, stop)


def _masked_logits(q, k, segment_ids, scale, window, rows, keys) -> jax.Array:
  """Of a block: [batch, kv_heads, group, rows, keys], the lowest number where a query does not see a key."""
  logits = scale * _einsum("bhgqk,bhsk->bhgqs", q[..., rows, :], k[:, :, keys])
  distance = jnp.arange(rows.start, rows.stop)[:, None] - jnp.arange(keys.start, keys.stop)
  mask = distance >= 0
  if window:
    mask = mask & (distance < window)
  if segment_ids is not None:
    mask = mask & segment_mask(segment_ids[:, rows], segment_ids[:, keys])[:, :, None]
  return jnp.where(mask, logits, jnp.finfo(logits.dtype).min)


def segment_mask(q_segment_ids: jax.Array, kv_segment_ids: jax.Array) -> jax.Array:
  """True where a query and a key are of one segment: [batch, 1, queries, keys]."""
  return q_segment_ids[:, None, :, None] == kv_segment_ids[:, None, None, :]


def _einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.einsum(equation, x, y, **accumulation(x))
