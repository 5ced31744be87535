"""SwiGLU (Shazeer 2020): the dense feed-forward of every DeepSeek model."""

import jax
from flax import nnx

from deepseek_jax.model.linear import Linear
from deepseek_jax.model_config import ModelConfig


class SwiGLU(nnx.Module):
  """down(silu(gate(x)) * up(x))."""

  def __init__(self, config: ModelConfig, rngs):
    shape = (config.embed, config.mlp)
    self.gate = Linear(shape, ("embed", "mlp"), config, rngs)
    self.up = Linear(shape, ("embed", "mlp"), config, rngs)
    self.down = Linear(shape[::-1], ("mlp", "embed"), config, rngs)

  def __call__(self, x):
    inner = ("batch", "seq", "mlp")
    h = jax.nn.silu(self.gate("bsd,df->bsf", x, inner)) * self.up("bsd,df->bsf", x, inner)  # [batch, seq, mlp]
    return self.down("bsf,fd->bsd", h, ("batch", "seq", None))  # [batch, seq, embed]
