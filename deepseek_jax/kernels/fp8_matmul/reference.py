"""The product of the dequantised matrices, in float64 where jax has it."""

import jax
import jax.numpy as jnp


def matmul(a, b, out_dtype):
  a, b = (q.dequantized(jnp.result_type(float)) for q in (a, b))
  return jnp.dot(a, b.T, precision=jax.lax.Precision.HIGHEST).astype(out_dtype)
