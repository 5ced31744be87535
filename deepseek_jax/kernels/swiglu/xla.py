"""The product, which XLA fuses with what reads it, and the quantiser."""

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.quantize import xla


def swiglu_quantize(gate, up, block, pow2_scales):
  return xla.quantize_both(swiglu(gate, up), block, pow2_scales)


def swiglu(gate, up):
  """silu(gate) * up in float32."""
  return jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
