"""Multi-token prediction (V3 section 2.2): each depth is a block that takes the hidden states and the next tokens."""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model.batch_context import BatchContext
from deepseek_jax.model.block import Block
from deepseek_jax.model.layer_output import LayerOutput
from deepseek_jax.model.linear import Linear
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.model.paged_cache import LayerCache
from deepseek_jax.model_config import ModelConfig


class MTPLayer(nnx.Module):
  """One depth (V3 eq. 21 to 23). Embedding and head are the main model's.

  Two points are as in transformers:
  - The embedding comes first in the concatenation. The report writes the hidden state first.
  - The next depth gets the hidden state after its norm. torchtitan passes it on before the norm.
  """

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None):
    self.embed_norm = RMSNorm(config.embed, config)
    self.hidden_norm = RMSNorm(config.embed, config)
    # The FP8 releases keep this one in bfloat16.
    self.proj = Linear((2 * config.embed, config.embed), ("embed", None), config, rngs, precision="bf16")
    self.block = Block(config, rngs, is_moe=config.moe.num_routed_experts > 0)
    self.norm = RMSNorm(config.embed, config)

  def __call__(
    self,
    hidden: jax.Array,
    embeddings: jax.Array,
    batch_context: BatchContext,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, LayerOutput]:
    """(hidden states, output of the block).

    hidden: [batch, stream, embed], of the depth before. embeddings: [batch, stream, embed], of the next tokens.
    """
    x, output = self.block(self.merge(hidden, embeddings), batch_context, dropout_key)
    return self.norm(x), output

  def merge(self, hidden: jax.Array, embeddings: jax.Array) -> jax.Array:
    """What the block takes, [batch, stream, embed] (V3 eq. 21)."""
    x = jnp.concatenate([self.embed_norm(embeddings), self.hidden_norm(hidden)], -1)  # [batch, stream, 2 embed]
    return self.proj("bsd,de->bse", x)

  def decode(
    self, hidden: jax.Array, embeddings: jax.Array, batch_context: BatchContext, cache: LayerCache
  ) -> tuple[jax.Array, LayerCache]:
    """As `__call__` of new tokens, and the cache with them."""
    x, cache = self.block.decode(self.merge(hidden, embeddings), batch_context, cache)
    return self.norm(x), cache
