"""What the Pallas grouped matmuls share: padding of rows, and zeros for rows of no group."""

import jax
import jax.numpy as jnp


def pad_rows(x: jax.Array, multiple: int) -> jax.Array:
  """`x` [rows, width] with zero rows up to a multiple of `multiple`."""
  return jnp.pad(x, ((0, -x.shape[0] % multiple), (0, 0)))


def zero_ungrouped_rows(y: jax.Array, group_sizes: jax.Array) -> jax.Array:
  """`y` [rows, width] with zeros in rows of no group, which the kernels leave undefined."""
  return jnp.where(jnp.arange(y.shape[0])[:, None] < group_sizes.sum(), y, 0)
