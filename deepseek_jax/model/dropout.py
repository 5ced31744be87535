"""Dropout as a pure function of its key and of the token, so that every layout of batch and sequence drops the same values."""

import jax
import jax.numpy as jnp


def dropout(x, rate, keys):
  """`x` with a share `rate` of its values zeroed and the rest scaled up. No keys, or rate 0, is no dropout.

  `keys` has the leading dimensions of `x`: each key draws for the dimensions that are left.
  """
  if keys is None or rate == 0:
    return x
  draw = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[keys.ndim :]))
  return jnp.where(draw(keys.reshape(-1)).reshape(x.shape), x / (1 - rate), 0)


def keys_at(key, *indices):
  """Keys [n, m, ...] for all combinations of `indices`, arrays of int [n], [m], ...; None for no key."""
  for index in indices if key is not None else ():
    fold = jax.vmap(lambda key, index=index: jax.vmap(lambda i: jax.random.fold_in(key, i))(index))
    key = fold(key.reshape(-1)).reshape(*key.shape, -1)
  return key
