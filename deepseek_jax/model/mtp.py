"""Multi-token prediction (V3 section 2.2): one more block a depth, from the hidden state before it and the next token."""

import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model.block import Block
from deepseek_jax.model.linear import Linear
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.model_config import ModelConfig


class MTPLayer(nnx.Module):
  """V3 eq. 21 to 23. Embedding and head are the main model's.

  As in transformers: the embedding comes first in the concatenation (the report writes the hidden state first), and what
  goes in and on to the next depth is the hidden state after its norm (torchtitan's comes before it).
  """

  def __init__(self, config: ModelConfig, rngs):
    self.embed_norm = RMSNorm(config.embed, config)
    self.hidden_norm = RMSNorm(config.embed, config)
    # The FP8 releases keep this one in bfloat16.
    self.proj = Linear((2 * config.embed, config.embed), ("embed", None), config, rngs, precision="bf16")
    self.block = Block(config, rngs, experts=config.moe.num_routed_experts > 0)
    self.norm = RMSNorm(config.embed, config)

  def __call__(self, hidden, embedded, tokens, key=None):
    """(hidden, Routing, what a cache keeps): `hidden` of the depth before and `embedded` next tokens [batch, stream, embed]."""
    x = jnp.concatenate([self.embed_norm(embedded), self.hidden_norm(hidden)], -1)  # [batch, stream, 2 embed]
    x, routing, kept = self.block(self.proj("bsd,de->bse", x), tokens, key)
    return self.norm(x), routing, kept
