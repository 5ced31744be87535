"""Causal attention with grouped key and value heads (MHA when kv_heads = heads)."""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.kernels.attention import xla
from deepseek_jax.kernels.attention.api import attention
from deepseek_jax.kernels.implementations import Unsupported, chosen, log_once
from deepseek_jax.model.context import all_gather_kv_attention, context_parallel_attention
from deepseek_jax.model.dropout import dropout, keys_at
from deepseek_jax.model.linear import Linear, fused_linear
from deepseek_jax.model.rope import rotate
from deepseek_jax.model_config import AttentionConfig, ModelConfig
from deepseek_jax.sharding import all_gather_sequence, axis_index, mesh_axes


def attend(q, k, v, *, scale, segment_ids=None, dropout_rate=0.0, dropout_keys=None, implementation="auto"):
  """As `attention`, with dropout of the probabilities by `dropout_keys` [batch, heads]; no keys is no dropout.

  The kernels have no dropout: with it, XLA's products are used, whatever the `implementation`.
  """
  if dropout_keys is None:
    return attention(q, k, v, scale=scale, segment_ids=segment_ids, implementation=implementation)
  drop = lambda weights: dropout(weights, dropout_rate, dropout_keys.reshape(weights.shape[:3]))
  return xla.causal_attention(q, k, v, segment_ids, scale, drop)


def causal_attention(q, keys, expand, scale, config: AttentionConfig, tokens, key):
  """Attention of `q` [batch, seq, heads, key width] to the keys and values that `expand` makes of `keys`.

  Where devices share the sequence, `keys`, [batch, seq, ...] each, is what they send each other.
  """
  if mesh_axes("seq"):
    how = {"scale": scale, "axis": mesh_axes("seq")[0], "segment_ids": tokens.segment_ids}
    kernel = chosen("attention", config.implementation)
    if config.kv_comm == "gather" and kernel != "xla":
      try:
        return all_gather_kv_attention(q, keys, expand, implementation=kernel, **how)
      except Unsupported as e:
        if config.implementation != "auto":
          raise
        log_once(f"attention: by pairs of chunks, since {e}")
    return context_parallel_attention(q, keys, expand, kind=config.kv_comm, **how)
  drawn = None
  if key is not None and config.dropout:
    drawn = keys_at(
      key, tokens.sequence_ids, axis_index("heads") * q.shape[2] + jnp.arange(q.shape[2])
    )  # [batch, heads]
  return attend(
    q, *expand(keys),
    scale=scale, segment_ids=tokens.segment_ids, dropout_rate=config.dropout, dropout_keys=drawn,
    implementation=config.implementation,
  )  # fmt: skip


def decode_attention(q, k, v, position, *, scale):
  """Attention of a new token, `q` [batch, 1, heads, key width], to positions 0 .. `position` of what a cache holds."""
  return xla.masked_attention((jnp.arange(k.shape[1]) <= position)[None], q, k, v, scale=scale)


def update_cache(cache, new, position):
  """Each array of `cache` [batch, length, ...] with its part of `new` [batch, 1, ...] at `position`."""
  return jax.tree.map(lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, position, 1), cache, new)


class Attention(nnx.Module):
  """Queries, keys and values from the stream, rotated, attended, projected back (DeepSeek LLM section 2.2)."""

  def __init__(self, config: ModelConfig, rngs):
    a = config.attention
    # A single key head is a copy on every device that shares the heads.
    kv_axes = (None if a.kv_heads == 1 else "kv_heads", "head_dim")
    self.q = Linear((config.embed, a.heads, a.head_dim), ("embed", "heads", "head_dim"), config, rngs)
    self.k = Linear((config.embed, a.kv_heads, a.head_dim), ("embed", *kv_axes), config, rngs)
    self.v = Linear((config.embed, a.kv_heads, a.head_dim), ("embed", *kv_axes), config, rngs)
    # Attention's backward pass reads this as well: kept once, as it is. The report has it in E5M6, which JAX has not.
    self.o = Linear((a.heads, a.head_dim, config.embed), ("heads", "head_dim", "embed"), config, rngs, cached=False)
    self.config = a

  def heads(self, x, rotation):
    """Queries [batch, seq, heads, head_dim]; keys and values [batch, seq, kv_heads, head_dim]."""
    q, k, v = fused_linear("bsd,dhk->bshk", x, self.q, self.k, self.v)
    return rotate(q, *rotation).astype(x.dtype), rotate(k, *rotation).astype(x.dtype), v

  def __call__(self, x, tokens, key=None):
    """(terms of the sum [batch, seq, embed], what a cache keeps: keys and values); x is [batch, stream, embed]."""
    q, k, v = self.heads(all_gather_sequence(x), tokens.rotation)
    y = causal_attention(q, (k, v), lambda keys: keys, self.config.head_dim**-0.5, self.config, tokens, key)
    return self.o("bshk,hkd->bsd", y), (k, v)

  def decode(self, x, rotation, cache, position):
    """As `__call__` for the token at `position`, `x` [batch, 1, embed], with the keys and values of those before it."""
    q, *new = self.heads(x, rotation)
    k, v = update_cache(cache, tuple(new), position)
    y = decode_attention(q, k, v, position, scale=self.config.head_dim**-0.5)
    return self.o("bshk,hkd->bsd", y), (k, v)
