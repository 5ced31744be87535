"""Multi-head latent attention (V2 section 2.1): keys and values come from one small latent, and only that is cached."""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.kernels.attention import xla
from deepseek_jax.model.attention import causal_self_attention
from deepseek_jax.model.batch_context import BatchContext
from deepseek_jax.model.layer_output import LayerOutput
from deepseek_jax.model.linear import Linear, fused_linear
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.model.paged_cache import LayerCache, TokenShapes
from deepseek_jax.model.rope import apply_rope, mscale
from deepseek_jax.model_config import AttentionConfig, ModelConfig
from deepseek_jax.sharding import all_gather_sequence

# (latents [batch, seq, kv_lora_rank], the rotated key that all heads share [batch, seq, rope]).
Latents = tuple[jax.Array, jax.Array]


def softmax_scale(config: AttentionConfig) -> float:
  """(nope + rope)^-1/2, times YaRN's temperature (V2 section 3.1.4: 0.114721, V3: 0.135234 with YaRN on)."""
  width = config.qk_nope_head_dim + config.qk_rope_head_dim
  return width**-0.5 * mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2


class MLA(nnx.Module):
  """Expanded for training (`__call__`), absorbed for decoding (`decode`): one function, its products in two orders."""

  @staticmethod
  def token_shapes(config: AttentionConfig) -> TokenShapes:
    """What the cache has of a token in a layer: its latent, and the key that all heads share (V2 section 2.1)."""
    return ((config.kv_lora_rank,), (None,)), ((config.qk_rope_head_dim,), (None,))

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None):
    a = config.attention
    self.config, self.scale = a, softmax_scale(a)
    query = (a.heads, a.qk_nope_head_dim + a.qk_rope_head_dim)
    if a.q_lora_rank:
      self.q_a = Linear((config.embed, a.q_lora_rank), ("embed", None), config, rngs)
      self.q_norm = RMSNorm(a.q_lora_rank, config, a.latent_norm_eps)
      self.q_b = Linear((a.q_lora_rank, *query), ("latent", "heads", "head_dim"), config, rngs)
    else:
      self.q = Linear((config.embed, *query), ("embed", "heads", "head_dim"), config, rngs)
    self.kv_a = Linear((config.embed, a.kv_lora_rank + a.qk_rope_head_dim), ("embed", None), config, rngs)
    self.kv_norm = RMSNorm(a.kv_lora_rank, config, a.latent_norm_eps)
    key_value = (a.heads, a.qk_nope_head_dim + a.v_head_dim)
    self.kv_b = Linear((a.kv_lora_rank, *key_value), ("latent", "heads", "head_dim"), config, rngs)
    # Not saved in FP8: attention's backward pass saves this input too. V3 has it in E5M6, which JAX lacks.
    self.o = Linear(
      (a.heads, a.v_head_dim, config.embed), ("heads", "head_dim", "embed"), config, rngs, fp8_residual=False
    )

  def project_latents(
    self, x: jax.Array, rotation: tuple[jax.Array, jax.Array]
  ) -> tuple[tuple[jax.Array, jax.Array], Latents]:
    """(queries, latents) of x [batch, latent_seq, embed]. Each device makes the down-projections of its own positions.

    Queries: parts without and with RoPE, [batch, seq, heads, nope] and [batch, seq, heads, rope] (V2 eq. 37 to 39).
    Latents: [batch, seq, kv_lora_rank] and the key that all heads share, [batch, seq, rope] (V2 eq. 41, 43).
    """
    if self.config.q_lora_rank:
      q_latent, kv_a = fused_linear("bsd,dr->bsr", x, self.q_a, self.kv_a)
      q_latent, kv_a = all_gather_sequence(q_latent, "latent_seq"), all_gather_sequence(kv_a, "latent_seq")
      q = self.q_b("bsr,rhk->bshk", self.q_norm(q_latent))
    else:
      q = self.q("bsd,dhk->bshk", all_gather_sequence(x, "latent_seq"))
      kv_a = all_gather_sequence(self.kv_a("bsd,dc->bsc", x), "latent_seq")
    q_nope, q_rope = jnp.split(q, [self.config.qk_nope_head_dim], -1)
    latent, k_rope = jnp.split(kv_a, [self.config.kv_lora_rank], -1)
    k_rope = k_rope[:, :, None]  # [batch, seq, 1, rope]
    q_rope = apply_rope(q_rope, *rotation, interleaved=True).astype(x.dtype)
    k_rope = apply_rope(k_rope, *rotation, interleaved=True).astype(x.dtype)
    return (q_nope, q_rope), (self.kv_norm(latent), k_rope[:, :, 0])

  def __call__(
    self, x: jax.Array, batch_context: BatchContext, dropout_key: jax.Array | None = None
  ) -> tuple[jax.Array, LayerOutput]:
    """(partial sums [batch, seq, embed], LayerOutput); x is [batch, stream, embed]."""
    x = all_gather_sequence(x, "stream", "latent_seq")
    queries, latents = self.project_latents(x, batch_context.rotation)
    kv_b = self.kv_b.weight(x.dtype)

    def expand_kv(latents):
      """Keys [batch, seq, heads, nope + rope] and values [batch, seq, heads, v_head_dim] (V2 eq. 42)."""
      latent, k_rope = latents
      k_nope, v = jnp.split(self.kv_b.einsum("bsc,chk->bshk", latent, kv_b), [self.config.qk_nope_head_dim], -1)
      k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
      return jnp.concatenate([k_nope, k_rope], -1), v

    q = jnp.concatenate(queries, -1)
    y = causal_self_attention(q, latents, expand_kv, self.scale, self.config, batch_context, dropout_key)
    return self.o("bshv,hvd->bsd", y), LayerOutput()

  def decode(
    self, x: jax.Array, rotation: tuple[jax.Array, jax.Array], cache: LayerCache
  ) -> tuple[jax.Array, LayerCache]:
    """(partial sums [batch, new, embed], cache with them) of the new tokens `x` [batch, new, embed].

    kv_b is absorbed into the query and the output (V2 section 2.1.2): each head attends to the latents themselves, with
    one key head of width kv_lora_rank + rope and one value head of width kv_lora_rank.
    """
    (q_nope, q_rope), new = self.project_latents(x, rotation)
    cache = cache.append(*new)
    latent, k_rope = cache.gather()
    k_up, v_up = jnp.split(self.kv_b.weight(x.dtype), [self.config.qk_nope_head_dim], -1)
    q_latent = jnp.einsum("bqhk,chk->bqhc", q_nope, k_up)
    q, k = jnp.concatenate([q_latent, q_rope], -1), jnp.concatenate([latent, k_rope], -1)
    mask = cache.mask(x.shape[1], self.config.window)
    y = xla.masked_attention(
      mask, q, k[:, :, None], latent[:, :, None], scale=self.scale
    )  # [batch, new, heads, kv_lora]
    y = jnp.einsum("bqhc,chv->bqhv", y, v_up)
    return self.o("bshv,hvd->bsd", y), cache
