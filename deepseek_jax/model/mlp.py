"""SwiGLU (Shazeer 2020): the feed-forward of dense layers, and of the shared experts."""

import jax
from flax import nnx

from deepseek_jax.model.linear import Linear
from deepseek_jax.model_config import ModelConfig


class SwiGLU(nnx.Module):
  """down(silu(gate(x)) * up(x)), of inner width `mlp`."""

  def __init__(self, mlp, config: ModelConfig, rngs):
    shape = (config.embed, mlp)
    self.gate = Linear(shape, ("embed", "mlp"), config, rngs)
    self.up = Linear(shape, ("embed", "mlp"), config, rngs)
    self.down = Linear(shape[::-1], ("mlp", "embed"), config, rngs)

  def __call__(self, x):
    inner = ("batch", "seq", "mlp")
    h = jax.nn.silu(self.gate("bsd,df->bsf", x, inner)) * self.up("bsd,df->bsf", x, inner)  # [batch, seq, mlp]
    return self.down("bsf,fd->bsd", h, ("batch", "seq", None))  # [batch, seq, embed]
