"""Dropout as a pure function of its key and the token: every layout of batch and sequence drops the same values."""

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
  """`x` with a fraction `rate` of its values set to zero and the others scaled by 1 / (1 - rate).

  keys: PRNG keys in the shape of the leading dimensions of `x`; each draws for the other dimensions. None: no dropout.
  """
  if keys is None or rate == 0:
    return x
  draw = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[keys.ndim :]))
  return jnp.where(draw(keys.reshape(-1)).reshape(x.shape), x / (1 - rate), 0)


def fold_in_grid(key: jax.Array | None, *indices: jax.Array) -> jax.Array | None:
  """Keys [n, m, ...], one for each combination of `indices`, which are int [n], [m], ... None for no key."""
  if key is None:
    return None
  for index in indices:
    fold_in = jax.vmap(lambda key, index=index: jax.vmap(lambda i: jax.random.fold_in(key, i))(index))
    key = fold_in(key.reshape(-1)).reshape(*key.shape, -1)
  return key
