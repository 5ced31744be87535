"""A loop over tiles of the contraction, whose products XLA makes."""

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.implementations import vary
from deepseek_jax.kernels.qtensor import FP8


def matmul(a, b, out_dtype):
  return accumulated(a, b).astype(out_dtype)


def accumulated(a, b):
  """`a` [m, k] times the transpose of `b` [n, k] in float32."""
  block, (m, n), steps = a.tile[1], (a.shape[0], b.shape[0]), a.scales.shape[1]
  a_values, b_values = (_whole(q.values, steps * block) for q in (a, b))

  def step(i, total):
    parts = (jax.lax.dynamic_slice_in_dim(values, i * block, block, 1) for values in (a_values, b_values))
    return total + product(*parts) * of_rows(a, i)[:, None] * of_rows(b, i)

  return jax.lax.fori_loop(0, steps, step, vary(jnp.zeros((m, n)), a.values, b.values)[0])


def product(a, b):
  """`a` [m, k] times the transpose of `b` [n, k], without scales, in float32. bfloat16 holds every value of FP8."""
  a, b = (x.astype(jnp.bfloat16) if x.dtype == FP8 else x for x in (a, b))
  precision = None if a.dtype == b.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
  contracted = ((1,), (1,)), ((), ())
  return jax.lax.dot_general(a, b, contracted, precision=precision, preferred_element_type=jnp.float32)


def of_rows(q, i):
  """The scale of each row of `q` [rows, columns] in tiles number `i` across."""
  return jnp.repeat(q.scales[:, i], q.tile[0])[: q.shape[0]]


def _whole(values, columns):
  return jnp.pad(values, ((0, 0), (0, columns - values.shape[1])))
