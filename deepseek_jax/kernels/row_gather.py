"""Gathers of rows and sums of gathered rows: each is the other's gradient, so that no pass has a scatter.

XLA's gradient of a gather is a scatter of wide rows. TPUs sort its indices, which takes seconds to compile.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def gather_rows(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
  """Rows `index` of `x`, zeros where the index is out of range: [n, width] in the dtype of `x`.

  Args:
    x: [m, width].
    index: [n] int, at least 0.
    inverse: [m, k] int, at least 0: for each row of `x` all positions in `index` that name it; out of range is none.
  """
  return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def gather_sum_rows(y: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
  """For each row of `inverse` the sum of the rows of `y` [n, width] that it names: [m, width], in at least float32.

  `index` and `inverse` as in `gather_rows`.
  """
  accumulator_dtype = jnp.promote_types(y.dtype, jnp.float32)

  def gather(positions):
    return y.at[positions].get(mode="fill", fill_value=0).astype(accumulator_dtype)

  # One column of `inverse` after the other: [m, k, width] at once would be most of an MoE layer's memory.
  columns = inverse.T
  return jax.lax.scan(lambda total, column: (total + gather(column), None), gather(columns[0]), columns[1:])[0]


def _gather_rows_fwd(x, index, inverse):
  return gather_rows(x, index, inverse), (index, inverse)


def _gather_rows_bwd(residuals, dy):
  return gather_sum_rows(dy, *residuals).astype(dy.dtype), None, None


def _gather_sum_rows_fwd(y, index, inverse):
  return gather_sum_rows(y, index, inverse), (jnp.zeros((), y.dtype), index, inverse)


def _gather_sum_rows_bwd(residuals, dx):
  like, index, inverse = residuals
  return gather_rows(dx.astype(like.dtype), index, inverse), None, None


gather_rows.defvjp(_gather_rows_fwd, _gather_rows_bwd)
gather_sum_rows.defvjp(_gather_sum_rows_fwd, _gather_sum_rows_bwd)
