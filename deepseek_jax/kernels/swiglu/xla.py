"""SwiGLU, which XLA fuses with what reads it, then quantization."""

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.qtensor import QTensor
from deepseek_jax.kernels.quantize import xla


def swiglu_quantize(gate: jax.Array, up: jax.Array, block: int, pow2_scales: bool) -> tuple[QTensor, QTensor]:
  return xla.quantize_both(swiglu_float32(gate, up), block, pow2_scales)


def swiglu_float32(gate: jax.Array, up: jax.Array) -> jax.Array:
  """silu(gate) * up in float32, of arrays of any dtype."""
  return jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
