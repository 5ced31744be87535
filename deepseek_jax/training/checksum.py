"""A checksum of an array's bits: exact in any order of its elements, and so the same on any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def sum_of_hashes(array: jax.Array, seed: jax.Array | np.uint32) -> jax.Array:
  """The sum [] uint32, modulo 2**32, of a hash of each element's bits and index. `seed` uint32 selects the hash.

  A change of one element of at most 4 bytes is always seen, any other with a probability of 1 - 2**-32. It detects
  accidental differences, not those of an adversary.
  """
  unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
  # Elements of 8 bytes are two words, on a last axis.
  bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
  sharding = jax.typeof(bits).sharding
  index = [jax.lax.broadcasted_iota(jnp.uint32, bits.shape, i, out_sharding=sharding) for i in range(bits.ndim)]
  hashes = functools.reduce(lambda hashed, word: _mix(hashed ^ word), [*index, bits], seed)
  return jnp.sum(hashes, dtype=jnp.uint32)


def _mix(word: jax.Array) -> jax.Array:
  """MurmurHash3's finalizer of uint32: each bit changes half of the others."""
  word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
  word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
  return word ^ (word >> 16)
