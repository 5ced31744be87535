"""RMSNorm (Zhang and Sennrich 2019), as in every DeepSeek model."""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model.linear import at_least_float32
from deepseek_jax.model_config import ModelConfig


class RMSNorm(nnx.Module):
  """x / rms(x) * scale over the last dimension; statistics in at least float32."""

  def __init__(self, width, config: ModelConfig, eps=None):
    self.scale = nnx.Param(jnp.ones((width,), jnp.dtype(config.param_dtype)), logical=(None,))
    self.eps = config.norm_eps if eps is None else eps

  def __call__(self, x):
    wide = x.astype(at_least_float32(x.dtype))
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.eps)
    # Cast down before the product with the scale, as the released models do (specs, trap 9).
    return normed.astype(x.dtype) * self.scale[...].astype(x.dtype)
