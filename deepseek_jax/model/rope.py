"""Rotary position embedding (Su et al. 2021), and YaRN, which extends it to longer contexts (Peng et al. 2023)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from deepseek_jax.model_config import AttentionConfig, YarnConfig


def rope_frequencies(dim: int, theta: float, yarn: YarnConfig) -> np.ndarray:
  """Radians per position of each of the `dim` / 2 pairs: float64 [dim / 2], so that no precision is lost here."""
  frequencies = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
  if yarn.factor == 1:
    return frequencies

  def pair_index(turns):
    """Index of the pair that makes so many turns over the original context."""
    return dim * math.log(yarn.original_seq / (turns * 2 * math.pi)) / (2 * math.log(theta))

  low = max(math.floor(pair_index(yarn.beta_fast)), 0)
  high = min(math.ceil(pair_index(yarn.beta_slow)), dim - 1)
  ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)  # 0: unchanged, 1: divided by factor
  return frequencies * (1 - ramp) + frequencies / yarn.factor * ramp


def mscale(factor: float, weight: float) -> float:
  """YaRN's attention temperature: sqrt(t) = 0.1 weight ln(factor) + 1 (V2 section 3.1.4)."""
  return 0.1 * weight * math.log(factor) + 1


def rope_cos_sin(positions: jax.Array, config: AttentionConfig, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
  """(cos, sin), each [batch or 1, seq, 1, rope_dim / 2] in `dtype`, of the angles of `positions` [batch or 1, seq]."""
  yarn = config.yarn
  # transformers scales cos and sin by this ratio, DeepSeek's inference code does not. It is 1 in all released models.
  scale = mscale(yarn.factor, 1)
  if yarn.mscale and yarn.mscale_all_dim:
    scale = mscale(yarn.factor, yarn.mscale) / mscale(yarn.factor, yarn.mscale_all_dim)
  frequencies = rope_frequencies(config.rope_dim, config.rope_theta, yarn).astype(dtype)
  angles = positions[:, :, None, None].astype(dtype) * frequencies
  return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False) -> jax.Array:
  """`x` [batch, seq, heads, rope_dim] rotated by its position, in the dtype of `cos`.

  Pairs are (i, i + rope_dim / 2), as in DeepSeek LLM and MoE, or (2i, 2i + 1) if `interleaved`, as in MLA. In both
  cases, the result has the first members of all pairs before the second ones. Products of queries and keys are the
  same.
  """
  x = x.astype(cos.dtype)
  first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else jnp.split(x, 2, -1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
