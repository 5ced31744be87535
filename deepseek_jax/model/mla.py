"""Multi-head latent attention (V2 section 2.1): keys and values come from one small latent, which is all a cache keeps."""

import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model.attention import causal_attention, decode_attention, update_cache
from deepseek_jax.model.linear import Linear, fused_linear
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.model.rope import mscale, rotate
from deepseek_jax.model_config import AttentionConfig, ModelConfig
from deepseek_jax.sharding import all_gather_sequence


def softmax_scale(config: AttentionConfig):
  """(nope + rope)^-1/2, times YaRN's temperature (V2 section 3.1.4: 0.114721, V3: 0.135234 with YaRN on)."""
  width = config.qk_nope_head_dim + config.qk_rope_head_dim
  return width**-0.5 * mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2


class MLA(nnx.Module):
  """Expanded for training (`__call__`), absorbed for decoding (`decode`): one function in two orders of its products."""

  def __init__(self, config: ModelConfig, rngs):
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
    # Attention's backward pass reads this as well: kept once, as it is. The report has it in E5M6, which JAX has not.
    self.o = Linear((a.heads, a.v_head_dim, config.embed), ("heads", "head_dim", "embed"), config, rngs, cached=False)

  def project_latents(self, x, rotation):
    """(queries, what a cache keeps) of x [batch, latent_seq, embed]: the products down are of a device's own positions.

    Queries: parts without and with position, [batch, seq, heads, nope] and [batch, seq, heads, rope] (V2 eq. 37 to 39).
    Kept: [batch, seq, kv_lora_rank] and the key all heads share, [batch, seq, rope] (V2 eq. 41, 43).
    """
    if self.config.q_lora_rank:
      latent, both = (all_gather_sequence(y, "latent_seq") for y in fused_linear("bsd,dr->bsr", x, self.q_a, self.kv_a))
      q = self.q_b("bsr,rhk->bshk", self.q_norm(latent))
    else:
      q, both = (
        self.q("bsd,dhk->bshk", all_gather_sequence(x, "latent_seq")),
        all_gather_sequence(self.kv_a("bsd,dc->bsc", x), "latent_seq"),
      )
    nope, rope = jnp.split(q, [self.config.qk_nope_head_dim], -1)
    latent, shared = jnp.split(both, [self.config.kv_lora_rank], -1)
    q_rope, k_rope = (rotate(y, *rotation, interleaved=True).astype(x.dtype) for y in (rope, shared[:, :, None]))
    return (nope, q_rope), (self.kv_norm(latent), k_rope[:, :, 0])

  def __call__(self, x, tokens, key=None):
    """(terms of the sum [batch, seq, embed], what a cache keeps: latents and the shared keys); x is [batch, stream, embed]."""
    x = all_gather_sequence(x, "stream", "latent_seq")
    q, kept = self.project_latents(x, tokens.rotation)
    up = self.kv_b.weight(x.dtype)

    def expand(kept):
      """Keys [batch, seq, heads, nope + rope] and values [batch, seq, heads, v_head_dim] (V2 eq. 42)."""
      latent, k_rope = kept
      k_nope, v = jnp.split(self.kv_b.product("bsc,chk->bshk", latent, up), [self.config.qk_nope_head_dim], -1)
      shared = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
      return jnp.concatenate([k_nope, shared], -1), v

    y = causal_attention(jnp.concatenate(q, -1), kept, expand, self.scale, self.config, tokens, key)
    return self.o("bshv,hvd->bsd", y), kept

  def decode(self, x, rotation, cache, position):
    """As `__call__` for the token at `position`, `x` [batch, 1, embed], with the latents of those before it.

    The products with kv_b move over to the query and to the output (V2 section 2.1.2): each head attends to the latents
    themselves, as if there were one key head of width kv_lora_rank + rope and one value head of width kv_lora_rank.
    """
    (q_nope, q_rope), new = self.project_latents(x, rotation)
    latent, k_rope = update_cache(cache, new, position)
    up_key, up_value = jnp.split(self.kv_b.weight(x.dtype), [self.config.qk_nope_head_dim], -1)
    q_latent = jnp.einsum("bqhk,chk->bqhc", q_nope, up_key)
    q, k = jnp.concatenate([q_latent, q_rope], -1), jnp.concatenate([latent, k_rope], -1)
    y = decode_attention(q, k[:, :, None], latent[:, :, None], position, scale=self.scale)  # [batch, 1, heads, kv_lora]
    y = jnp.einsum("bqhc,chv->bqhv", y, up_value)
    return self.o("bshv,hvd->bsd", y), (latent, k_rope)
