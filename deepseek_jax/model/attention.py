"""Causal attention with grouped key and value heads (MHA when kv_heads = heads)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.kernels.attention import xla
from deepseek_jax.kernels.attention.api import attention
from deepseek_jax.model.batch_context import BatchContext
from deepseek_jax.model.context_parallel import all_gather_kv_attention, context_parallel_attention
from deepseek_jax.model.dropout import dropout, fold_in_grid
from deepseek_jax.model.kernel_choice import may_use_attention_kernel
from deepseek_jax.model.layer_output import LayerOutput
from deepseek_jax.model.linear import Linear, fused_linear
from deepseek_jax.model.paged_cache import LayerCache, TokenShapes
from deepseek_jax.model.rope import apply_rope
from deepseek_jax.model_config import AttentionConfig, ModelConfig
from deepseek_jax.sharding import all_gather_sequence, axis_index, mesh_axes
from deepseek_jax.typing import PyTree


def attention_with_dropout(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  scale: float,
  segment_ids: jax.Array | None = None,
  window: int = 0,
  dropout_rate: float = 0.0,
  dropout_keys: jax.Array | None = None,
  implementation: str = "auto",
) -> jax.Array:
  """As `attention` of the kernels, with dropout of the probabilities by `dropout_keys` [batch, heads], if given.

  The kernels have no dropout. With it, XLA's matrix products are used, whatever the `implementation`.
  """
  if dropout_keys is None:
    return attention(q, k, v, scale=scale, segment_ids=segment_ids, window=window, implementation=implementation)

  def drop(probabilities):
    return dropout(probabilities, dropout_rate, dropout_keys.reshape(probabilities.shape[:3]))

  return xla.causal_dot_product_attention(q, k, v, segment_ids, scale, window, drop)


def causal_self_attention(
  q: jax.Array,
  kv: PyTree,
  expand_kv: Callable[[Any], tuple[jax.Array, jax.Array]],
  scale: float,
  config: AttentionConfig,
  batch_context: BatchContext,
  dropout_key: jax.Array | None,
) -> jax.Array:
  """Attention of `q` [batch, seq, heads, key width] to earlier positions: all, or the last `config.window`.

  Args:
    kv: tree of arrays [batch, seq, ...]. Where devices share the sequence, they exchange these.
    expand_kv: makes keys [batch, seq, kv_heads, key width] and values [batch, seq, kv_heads, value width] of `kv`.

  Returns:
    [batch, seq, heads, value width].
  """
  segment_ids = batch_context.segment_ids
  if mesh_axes("seq"):
    options: dict[str, Any] = {
      "scale": scale,
      "axis": mesh_axes("seq")[0],
      "segment_ids": segment_ids,
      "window": config.window,
    }
    by_chunk_pairs = functools.partial(context_parallel_attention, q, kv, expand_kv, kind=config.kv_comm, **options)
    if not may_use_attention_kernel(config, context_parallel=True):
      return by_chunk_pairs()
    return all_gather_kv_attention(
      q, kv, expand_kv, **options, implementation=config.implementation, fallback=by_chunk_pairs
    )
  dropout_keys = None
  if dropout_key is not None and config.dropout:
    may_use_attention_kernel(config, context_parallel=False)  # it logs that the kernel is not used
    heads = axis_index("heads") * q.shape[2] + jnp.arange(q.shape[2])
    dropout_keys = fold_in_grid(dropout_key, batch_context.sequence_ids, heads)  # [batch, heads]
  k, v = expand_kv(kv)
  return attention_with_dropout(
    q, k, v,
    scale=scale, segment_ids=segment_ids, window=config.window, dropout_rate=config.dropout, dropout_keys=dropout_keys,
    implementation=config.implementation,
  )  # fmt: skip


def kv_axes(config: AttentionConfig) -> tuple[str | None, str]:
  """Logical axes of a token's keys. A single key head is replicated on the devices that share the heads."""
  return (None if config.kv_heads == 1 else "kv_heads", "head_dim")


class Attention(nnx.Module):
  """Multi-head or grouped-query attention with RoPE (DeepSeek LLM section 2.2). Its cache is keys and values."""

  @staticmethod
  def token_shapes(config: AttentionConfig) -> TokenShapes:
    """What the cache has of a token in a layer: its key and its value."""
    shape = (config.kv_heads, config.head_dim), kv_axes(config)
    return shape, shape

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None):
    a = config.attention
    self.q = Linear((config.embed, a.heads, a.head_dim), ("embed", "heads", "head_dim"), config, rngs)
    self.k = Linear((config.embed, a.kv_heads, a.head_dim), ("embed", *kv_axes(a)), config, rngs)
    self.v = Linear((config.embed, a.kv_heads, a.head_dim), ("embed", *kv_axes(a)), config, rngs)
    # Not saved in FP8: attention's backward pass saves this input too. V3 has it in E5M6, which JAX lacks.
    self.o = Linear(
      (a.heads, a.head_dim, config.embed), ("heads", "head_dim", "embed"), config, rngs, fp8_residual=False
    )
    self.config = a

  def project_qkv(self, x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [batch, seq, heads, head_dim], k and v [batch, seq, kv_heads, head_dim] of x [batch, seq, embed]."""
    q, k, v = fused_linear("bsd,dhk->bshk", x, self.q, self.k, self.v)
    return apply_rope(q, *rotation).astype(x.dtype), apply_rope(k, *rotation).astype(x.dtype), v

  def __call__(
    self, x: jax.Array, batch_context: BatchContext, dropout_key: jax.Array | None = None
  ) -> tuple[jax.Array, LayerOutput]:
    """(partial sums [batch, seq, embed], LayerOutput); x is [batch, stream, embed]."""
    q, k, v = self.project_qkv(all_gather_sequence(x), batch_context.rotation)
    scale = self.config.head_dim**-0.5
    y = causal_self_attention(q, (k, v), lambda kv: kv, scale, self.config, batch_context, dropout_key)
    return self.o("bshk,hkd->bsd", y), LayerOutput()

  def decode(
    self, x: jax.Array, rotation: tuple[jax.Array, jax.Array], cache: LayerCache
  ) -> tuple[jax.Array, LayerCache]:
    """(partial sums [batch, new, embed], cache with them) of the new tokens `x` [batch, new, embed]."""
    q, *new = self.project_qkv(x, rotation)
    cache = cache.append(*new)
    k, v = cache.gather()
    mask = cache.mask(x.shape[1], self.config.window)
    y = xla.masked_attention(mask, q, k, v, scale=self.config.head_dim**-0.5)
    return self.o("bshk,hkd->bsd", y), cache
