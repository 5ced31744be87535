"""All scores of a sequence in memory, as XLA makes them."""

import functools

import jax
import jax.numpy as jnp


def attention(q, k, v, segment_ids, scale):
  # The library's function wants equal widths, and keeps its softmax in float32 in a float64 run.
  if q.shape[-1] == v.shape[-1] and q.dtype != jnp.float64:
    mask = None if segment_ids is None else _same(segment_ids, segment_ids)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, is_causal=True)
  return causal_attention(q, k, v, segment_ids, scale)


def attention_of_part(q, k, v, segment_ids, scale, positions, part):
  mask = jnp.asarray(positions)[part][:, None] >= jnp.arange(k.shape[1])
  mask = mask if segment_ids is None else mask & _same(*segment_ids)
  return jax.checkpoint(functools.partial(masked_attention, scale=scale), prevent_cse=False)(mask, q, k, v)


def causal_attention(q, k, v, segment_ids, scale, drop=lambda weights: weights):
  """As `attention`; `drop` is as in `masked_attention`. The backward pass makes the scores again."""
  mask = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))
  mask = mask if segment_ids is None else mask & _same(segment_ids, segment_ids)  # [seq, seq] or [batch, 1, seq, seq]
  return jax.checkpoint(functools.partial(masked_attention, scale=scale, drop=drop), prevent_cse=False)(mask, q, k, v)


def masked_attention(mask, q, k, v, *, scale, drop=lambda weights: weights):
  """Attention of queries to keys of any number: `mask` [queries, keys] or [batch, 1, queries, keys] is True where seen.

  drop: of the softmax [batch, kv_heads, group, queries, keys], in the dtype of `v`, makes what weighs the values.
  """
  q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])  # [batch, queries, kv_heads, group, key width]
  accumulated = jnp.promote_types(q.dtype, jnp.float32)
  # [batch, kv_heads, group, queries, keys]
  logits = scale * jnp.einsum("bqhgk,bshk->bhgqs", q, k, preferred_element_type=accumulated)
  mask = mask if mask.ndim == 2 else mask[:, :, None]
  weights = jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(logits.dtype).min))
  y = jnp.einsum("bhgqs,bshv->bqhgv", drop(weights.astype(v.dtype)), v)
  return y.reshape(*y.shape[:2], -1, y.shape[-1])  # [batch, queries, heads, value width]


def _same(of_queries, of_keys):
  return of_queries[:, None, :, None] == of_keys[:, None, None, :]  # [batch, 1, queries, keys]
