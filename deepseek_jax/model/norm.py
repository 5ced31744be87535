"""RMSNorm (Zhang and Sennrich 2019), as in every DeepSeek model."""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model.linear import at_least_float32
from deepseek_jax.model_config import ModelConfig


class RMSNorm(nnx.Module):
  """x / rms(x) * scale over the last dimension, of size `width`; statistics in at least float32."""

  def __init__(self, width: int, config: ModelConfig, eps: float | None = None):
    self.scale = nnx.Param(jnp.ones((width,), jnp.dtype(config.param_dtype)), logical=(None,))
    self.eps = config.norm_eps if eps is None else eps

  def __call__(self, x: jax.Array) -> jax.Array:
    """`x` [..., width] normalized, in its dtype."""
    x_wide = x.astype(at_least_float32(x.dtype))
    normed = x_wide * jax.lax.rsqrt(jnp.mean(jnp.square(x_wide), -1, keepdims=True) + self.eps)
    # Cast down before the product with the scale, as the released models do.
    return normed.astype(x.dtype) * self.scale[...].astype(x.dtype)
