"""One pre-norm transformer block."""

import jax
from flax import nnx

from deepseek_jax.model.attention import Attention
from deepseek_jax.model.dropout import dropout
from deepseek_jax.model.mla import MLA
from deepseek_jax.model.mlp import SwiGLU
from deepseek_jax.model.moe import MoE
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.model_config import ModelConfig

ATTENTION = {"gqa": Attention, "mla": MLA}


class Block(nnx.Module):
  """x + attn(norm(x)), then x + mlp(norm(x)); the feed-forward is a dense SwiGLU, `mlp`, or a mixture of experts, `moe`."""

  def __init__(self, config: ModelConfig, rngs, experts=False):
    self.attn_norm = RMSNorm(config.embed, config)
    self.attn = ATTENTION[config.attention.kind](config, rngs)
    self.mlp_norm = RMSNorm(config.embed, config)
    if experts:
      self.moe = MoE(config, rngs)
    else:
      self.mlp = SwiGLU(config.mlp, config, rngs)
    self.dropout, self.experts = config.dropout, experts

  def feed_forward(self, x, exempt=None):
    """([batch, seq, embed], Routing, or None in a dense block)."""
    return self.moe(x, exempt) if self.experts else (self.mlp(x), None)

  def __call__(self, x, rotation, segment_ids=None, key=None, exempt=None):
    """(x, Routing or None, what a cache keeps); x is [batch, seq, embed], `exempt` as in MoE."""
    keys = (None,) * 3 if key is None else jax.random.split(key, 3)
    y, kept = self.attn(self.attn_norm(x), rotation, segment_ids, keys[0])
    x = x + dropout(y, self.dropout, keys[1])
    y, routing = self.feed_forward(self.mlp_norm(x), exempt)
    return x + dropout(y, self.dropout, keys[2]), routing, kept

  def decode(self, x, rotation, cache, position):
    """(x, cache) after the token at `position`; x is [batch, 1, embed]."""
    y, cache = self.attn.decode(self.attn_norm(x), rotation, cache, position)
    x = x + y
    return x + self.feed_forward(self.mlp_norm(x))[0], cache
