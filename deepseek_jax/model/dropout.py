"""Dropout as a pure function of its key."""

import jax
import jax.numpy as jnp


def dropout(x, rate, key):
  """`x` with a share `rate` of its values zeroed and the rest scaled up. No key, or rate 0, is no dropout.

  The mask depends on the key and the shape alone, so that every mesh drops the same values.
  """
  if key is None or rate == 0:
    return x
  keep = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=jax.typeof(x).sharding)
  return jnp.where(keep, x / (1 - rate), 0)
