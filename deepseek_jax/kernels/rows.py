"""Rows that are copied to places, and rows at places that are added up: each the other's gradient, and both are gathers.

XLA's gradient of a gather is a scatter of wide rows, for which TPUs sort the indices; both take seconds to compile.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def rows_at(x, index, inverse):
  """Rows `index` of `x`, zeros where it is out of range: [n, width].

  Args:
    x: [m, width]. index: [n] int, at least 0.
    inverse: [m, k] int, at least 0: the places of each row of `x` in `index`, all of them; out of range is none.
  """
  return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def sums_at(y, index, inverse):
  """For each row of `inverse` the sum of the rows of `y` [n, width] that are at its places: [m, width], in at least float32.

  `index` and `inverse` as in `rows_at`.
  """
  wide = jnp.promote_types(y.dtype, jnp.float32)
  at = lambda places: y.at[places].get(mode="fill", fill_value=0).astype(wide)
  # One place after the other: [m, k, width] would be most of a mixture's memory.
  columns = inverse.T
  return jax.lax.scan(lambda total, places: (total + at(places), None), at(columns[0]), columns[1:])[0]


rows_at.defvjp(
  lambda x, index, inverse: (rows_at(x, index, inverse), (index, inverse)),
  lambda places, dy: (sums_at(dy, *places).astype(dy.dtype), None, None),
)
sums_at.defvjp(
  lambda y, index, inverse: (sums_at(y, index, inverse), (jnp.zeros((), y.dtype), index, inverse)),
  lambda kept, dx: (rows_at(dx.astype(kept[0].dtype), *kept[1:]), None, None),
)
