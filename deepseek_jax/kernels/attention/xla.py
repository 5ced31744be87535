"""Attention with all scores of a sequence in memory, as XLA computes it."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.kernels.attention import query_blocks
from deepseek_jax.kernels.attention.query_blocks import segment_mask
from deepseek_jax.kernels.implementations import device_kind


def _no_dropout(probabilities: jax.Array) -> jax.Array:
  return probabilities


def attention(
  q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, scale: float, window: int
) -> jax.Array:
  if device_kind() == "cpu" and q.shape[1] > query_blocks.MIN_ROWS:
    return query_blocks.attention(q, k, v, segment_ids, scale, window)
  # jax.nn.dot_product_attention wants equal widths, and keeps its softmax in float32 in a float64 run.
  if q.shape[-1] == v.shape[-1] and q.dtype != jnp.float64:
    mask = None if segment_ids is None else segment_mask(segment_ids, segment_ids)
    local = (window - 1, 0) if window else None
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, is_causal=True, local_window_size=local)
  return causal_dot_product_attention(q, k, v, segment_ids, scale, window)


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
  q_positions, k_positions = jnp.asarray(positions)[shard][:, None], jnp.arange(k.shape[1])
  mask = q_positions >= k_positions
  if window:
    mask = mask & (q_positions - k_positions < window)
  if segment_ids is not None:
    mask = mask & segment_mask(*segment_ids)
  return jax.checkpoint(functools.partial(masked_attention, scale=scale), prevent_cse=False)(mask, q, k, v)


def causal_dot_product_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array | None,
  scale: float,
  window: int = 0,
  dropout: Callable[[jax.Array], jax.Array] = _no_dropout,
) -> jax.Array:
  """As `attention`, with `dropout` as in `masked_attention`. The backward pass recomputes the scores."""
  pairs = jnp.ones((q.shape[1], k.shape[1]), bool)
  mask = jnp.tril(pairs)
  if window:
    mask = mask & ~jnp.tril(pairs, -window)
  if segment_ids is not None:
    mask = mask & segment_mask(segment_ids, segment_ids)  # [batch, 1, seq, seq]
  attend = functools.partial(masked_attention, scale=scale, dropout=dropout)
  return jax.checkpoint(attend, prevent_cse=False)(mask, q, k, v)


def masked_attention(
  mask: jax.Array,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  scale: float,
  dropout: Callable[[jax.Array], jax.Array] = _no_dropout,
) -> jax.Array:
  """Attention with an explicit mask: [batch, queries, heads, value width] in the dtype of `v`.

  Args:
    mask: [queries, keys] or [batch, 1, queries, keys] bool, True where a query sees a key.
    q: [batch, queries, heads, key width]. k: [batch, keys, kv_heads, key width].
    v: [batch, keys, kv_heads, value width].
    scale: factor of the logits.
    dropout: maps the softmax [batch, kv_heads, group, queries, keys], in the dtype of `v`, to the weights of the
      values.
  """
  q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])  # [batch, queries, kv_heads, group, key width]
  accumulator_dtype = jnp.promote_types(q.dtype, jnp.float32)
  # [batch, kv_heads, group, queries, keys]
  logits = scale * jnp.einsum("bqhgk,bshk->bhgqs", q, k, preferred_element_type=accumulator_dtype)
  mask = mask if mask.ndim == 2 else mask[:, :, None]
  probabilities = jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(logits.dtype).min))
  y = jnp.einsum("bhgqs,bshv->bqhgv", dropout(probabilities.astype(v.dtype)), v)
  return y.reshape(*y.shape[:2], -1, y.shape[-1])  # [batch, queries, heads, value width]
