"""Rotary position embedding (Su et al. 2021), and YaRN, which stretches it to longer contexts (Peng et al. 2023)."""

import math

import jax.numpy as jnp
import numpy as np

from deepseek_jax.model_config import AttentionConfig, YarnConfig


def frequencies(dim, theta, yarn: YarnConfig):
  """Radians a position turns each of the `dim` / 2 pairs by: float64 NumPy, so that no precision is lost here."""
  plain = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)  # [dim / 2]
  if yarn.factor == 1:
    return plain

  def pair(turns):
    """Index of the pair that turns so often over the original context."""
    return dim * math.log(yarn.original_seq / (turns * 2 * math.pi)) / (2 * math.log(theta))

  low, high = max(math.floor(pair(yarn.beta_fast)), 0), min(math.ceil(pair(yarn.beta_slow)), dim - 1)
  stretched = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)  # 0: as it was, 1: divided by factor
  return plain * (1 - stretched) + plain / yarn.factor * stretched


def mscale(factor, weight):
  """YaRN's attention temperature: sqrt(t) = 0.1 weight ln(factor) + 1 (V2 section 3.1.4)."""
  return 0.1 * weight * math.log(factor) + 1


def rotation(positions, config: AttentionConfig, dtype):
  """(cos, sin), each [batch or 1, seq, 1, rope_dim / 2], of the angles of `positions` [batch or 1, seq]."""
  yarn = config.yarn
  # transformers scales cos and sin by this ratio, DeepSeek's inference code does not: all released models have 1.
  both = yarn.mscale and yarn.mscale_all_dim
  scale = (
    mscale(yarn.factor, yarn.mscale) / mscale(yarn.factor, yarn.mscale_all_dim) if both else mscale(yarn.factor, 1)
  )
  angles = positions[:, :, None, None].astype(dtype) * frequencies(config.rope_dim, config.rope_theta, yarn).astype(
    dtype
  )
  return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x, cos, sin, interleaved=False):
  """`x` [batch, seq, heads, rope_dim] turned by its position; computed in the dtype of `cos`.

  The pairs are (i, i + rope_dim / 2), as in DeepSeek LLM and MoE, or `interleaved` (2i, 2i + 1), as in MLA. The result
  has the first members of all pairs before the second ones in both cases: products of queries and keys do not see it.
  """
  x = x.astype(cos.dtype)
  first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else jnp.split(x, 2, -1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
