"""One pre-norm transformer block."""

import jax
from flax import nnx

from deepseek_jax.model.attention import Attention
from deepseek_jax.model.dropout import dropout
from deepseek_jax.model.mlp import SwiGLU
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.model_config import ModelConfig


class Block(nnx.Module):
  """x + attn(norm(x)), then x + mlp(norm(x))."""

  def __init__(self, config: ModelConfig, rngs):
    self.attn_norm = RMSNorm(config.embed, config)
    self.attn = Attention(config, rngs)
    self.mlp_norm = RMSNorm(config.embed, config)
    self.mlp = SwiGLU(config, rngs)
    self.dropout = config.dropout

  def __call__(self, x, rotation, segment_ids=None, key=None):
    keys = (None,) * 3 if key is None else jax.random.split(key, 3)
    x = x + dropout(self.attn(self.attn_norm(x), rotation, segment_ids, keys[0]), self.dropout, keys[1])
    return x + dropout(self.mlp(self.mlp_norm(x)), self.dropout, keys[2])  # [batch, seq, embed]
