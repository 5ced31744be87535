"""SwiGLU (Shazeer 2020): the feed-forward of dense layers, and of the shared experts."""

import jax
from flax import nnx

from deepseek_jax.model.linear import Linear, fused_linear
from deepseek_jax.model_config import ModelConfig


class SwiGLU(nnx.Module):
  """down(silu(gate(x)) * up(x)) of inner width `mlp`. Devices that share `mlp` hold partial sums."""

  def __init__(self, mlp: int, config: ModelConfig, rngs: nnx.Rngs | None):
    shape = (config.embed, mlp)
    self.gate = Linear(shape, ("embed", "mlp"), config, rngs)
    self.up = Linear(shape, ("embed", "mlp"), config, rngs)
    self.down = Linear(shape[::-1], ("mlp", "embed"), config, rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Partial sums [batch, seq, embed] of `x` [batch, seq, embed]."""
    gate, up = fused_linear("bsd,df->bsf", x, self.gate, self.up)  # [batch, seq, mlp]
    down = self.down.weight(x.dtype)
    return self.down.einsum("bsf,fd->bsd", (gate, up), down)  # [batch, seq, embed]
