"""One pre-norm transformer block."""

import jax
from flax import nnx

from deepseek_jax.model.attention import Attention
from deepseek_jax.model.dropout import dropout, keys_at
from deepseek_jax.model.mla import MLA
from deepseek_jax.model.mlp import SwiGLU
from deepseek_jax.model.moe import MoE
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.sharding import all_gather_sequence, reduce_scatter_sequence

ATTENTION = {"gqa": Attention, "mla": MLA}


class Block(nnx.Module):
  """x + attn(norm(x)), then x + mlp(norm(x)); the feed-forward is a dense SwiGLU, `mlp`, or a mixture of experts, `moe`.

  On a tensor mesh the stream x is sharded over positions between the two, and whole inside them, where heads and inner
  widths are sharded: each half all-gathers what it takes and reduce-scatters what it gives (Korthikanti et al. 2022).
  """

  def __init__(self, config: ModelConfig, rngs, experts=False):
    self.attn_norm = RMSNorm(config.embed, config)
    self.attn = ATTENTION[config.attention.kind](config, rngs)
    self.mlp_norm = RMSNorm(config.embed, config)
    if experts:
      self.moe = MoE(config, rngs)
    else:
      self.mlp = SwiGLU(config.mlp, config, rngs)
    self.dropout, self.experts = config.dropout, experts

  def feed_forward(self, x, tokens=None):
    """(terms of the sum [batch, seq, embed], Routing, or None in a dense block); x is [batch, stream, embed]."""
    x = all_gather_sequence(x)
    return self.moe(x, tokens) if self.experts else (self.mlp(x), None)

  def __call__(self, x, tokens, key=None):
    """(x, Routing or None, what a cache keeps); x is [batch, stream, embed], `tokens` a BatchContext."""
    keys = (None,) * 3 if key is None else jax.random.split(key, 3)
    y, kept = self.attn(self.attn_norm(x), tokens, keys[0])
    x = x + self.dropped(reduce_scatter_sequence(y), tokens, keys[1])
    y, routing = self.feed_forward(self.mlp_norm(x), tokens)
    return x + self.dropped(reduce_scatter_sequence(y), tokens, keys[2]), routing, kept

  def dropped(self, y, tokens, key):
    """`y` after dropout, where there is any."""
    return dropout(y, self.dropout, keys_at(key, tokens.sequence_ids, tokens.position_ids)) if self.dropout else y

  def decode(self, x, rotation, cache, position):
    """(x, cache) after the token at `position`; x is [batch, 1, embed]."""
    y, cache = self.attn.decode(self.attn_norm(x), rotation, cache, position)
    x = x + reduce_scatter_sequence(y)
    return x + reduce_scatter_sequence(self.feed_forward(self.mlp_norm(x))[0]), cache
