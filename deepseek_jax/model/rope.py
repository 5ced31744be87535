"""Rotary position embedding (Su et al. 2021), half-split pairs (i, i + head_dim / 2) as in DeepSeek LLM."""

import jax.numpy as jnp


def rotation(positions, head_dim, theta, dtype):
  """(cos, sin), each [batch or 1, seq, 1, head_dim / 2], of the angles of `positions` [batch or 1, seq]."""
  frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=dtype) / head_dim)  # [head_dim / 2]
  angles = positions[:, :, None, None].astype(dtype) * frequencies
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x, cos, sin):
  """`x` [batch, seq, heads, head_dim] turned by its position; computed in the dtype of `cos`."""
  first, second = jnp.split(x.astype(cos.dtype), 2, -1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
