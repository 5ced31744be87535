"""Gathers of rows and sums of gathered rows: the values and gradients of plain indexing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.kernels.row_gather import gather_rows, gather_sum_rows

ROWS, PLACES, EACH, WIDTH = 7, 12, 3, 5


def problem(dtype):
  """(x, index, inverse, cotangent); some rows are named up to EACH times.

  PLACES and ROWS are out of range: they name none.
  """
  rng = np.random.default_rng(0)
  inverse = rng.permutation(ROWS * EACH).reshape(ROWS, EACH)  # those of PLACES and above are none
  index = np.full(PLACES, ROWS)
  for row, places in enumerate(inverse):
    index[places[places < PLACES]] = row
  x, dy = rng.normal(size=(ROWS, WIDTH)), rng.normal(size=(PLACES, WIDTH))
  return jnp.asarray(x, dtype), jnp.asarray(index), jnp.asarray(inverse), jnp.asarray(dy, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_are_those_of_indexing(dtype):
  x, index, inverse, dy = problem(dtype)
  y, vjp = jax.vjp(lambda x: gather_rows(x, index, inverse), x)
  expected, plain_vjp = jax.vjp(lambda x: x.at[index].get(mode="fill", fill_value=0), x.astype("float32"))
  np.testing.assert_array_equal(y, expected.astype(dtype))
  (dx,), (expected_gradient,) = vjp(dy), plain_vjp(dy.astype("float32"))
  assert dx.dtype == dtype
  # Summed in float32, and rounded once.
  np.testing.assert_allclose(np.asarray(dx, "float32"), expected_gradient, rtol=1e-6 if dtype == "float32" else 2**-8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_and_their_gradients_are_those_of_indexing(dtype):
  x, index, inverse, y = problem(dtype)
  total, vjp = jax.vjp(lambda y: gather_sum_rows(y, index, inverse), y)
  plain = lambda y: y.at[inverse].get(mode="fill", fill_value=0).sum(1)
  expected, plain_vjp = jax.vjp(plain, y.astype("float32"))
  assert total.dtype == "float32"
  np.testing.assert_allclose(total, expected, rtol=1e-6)
  (dy,), (expected_gradient,) = vjp(x.astype("float32")), plain_vjp(x.astype("float32"))
  np.testing.assert_array_equal(dy, expected_gradient.astype(dtype))


@pytest.mark.parametrize("function", [gather_rows, gather_sum_rows])
def test_no_pass_has_a_scatter(function):
  x, index, inverse, dy = problem("float32")
  argument = x if function is gather_rows else dy
  text = str(jax.make_jaxpr(jax.grad(lambda a: jnp.sin(function(a, index, inverse)).sum()))(argument))
  assert "gather" in text and "scatter" not in text
