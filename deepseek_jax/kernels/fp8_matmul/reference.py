"""The product of the dequantized matrices, in float64 where jax has it enabled."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.kernels.qtensor import QTensor


def matmul(a: QTensor, b: QTensor, out_dtype: DTypeLike) -> jax.Array:
  lhs, rhs = (q.dequantize(jnp.result_type(float)) for q in (a, b))
  return jnp.dot(lhs, rhs.T, precision=jax.lax.Precision.HIGHEST).astype(out_dtype)
