"""A loop over tiles of the contraction, whose products XLA makes."""

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.implementations import vary
from deepseek_jax.kernels.qtensor import FP8, QTensor


def matmul(a, b, out_dtype):
  if FP8 not in (a.values.dtype, b.values.dtype):  # and so without scales
    return product(a.values, b.values).astype(out_dtype)
  return accumulated(whole(a), whole(b)).astype(out_dtype)


def accumulated(a, b):
  """`a` [m, k] times the transpose of `b` [n, k] in float32, k being a number of whole tiles."""
  block, (m, n), steps = a.tile[1], (a.shape[0], b.shape[0]), a.scales.shape[1]

  def step(i, total):
    parts = (jax.lax.dynamic_slice_in_dim(q.values, i * block, block, 1) for q in (a, b))
    return total + product(*parts) * of_rows(a, i)[:, None] * of_rows(b, i)

  return jax.lax.fori_loop(0, steps, step, vary(jnp.zeros((m, n)), a.values, b.values)[0])


def product(a, b):
  """`a` [m, k] times the transpose of `b` [n, k], without scales, in float32.

  In float32 throughout: CPUs do not have every product of bfloat16 (jax 0.10.2). What FP8 or bfloat16 hold is exact
  in the fewer bits that chips multiply by default.
  """
  exact = all(x.dtype in (FP8, jnp.bfloat16) for x in (a, b))
  precision = jax.lax.Precision.DEFAULT if exact else jax.lax.Precision.HIGHEST
  a, b = (x.astype(jnp.float32) for x in (a, b))
  return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def of_rows(q, i):
  """The scale of each row of `q` [rows, columns] in tiles number `i` across."""
  return jnp.repeat(q.scales[:, i], q.tile[0])[: q.shape[0]]


def whole(q):
  """`q` with zeros that fill the last tile of its last dimension."""
  return QTensor(padded(q.values, -1, -q.shape[-1] % q.tile[1]), q.scales, q.tile)


def padded(values, dimension, missing):
  """`values` with `missing` zeros after those of `dimension`."""
  if not missing:
    return values
  # As whole numbers, which XLA for CPUs moves several times as fast (jax 0.10.2).
  bits = jax.lax.bitcast_convert_type(values, f"uint{8 * values.itemsize}")
  widths = [(0, 0)] * values.ndim
  widths[dimension] = 0, missing
  return jax.lax.bitcast_convert_type(jnp.pad(bits, widths), values.dtype)
