"""silu by its definition, then the quantiser's reference."""

import jax.numpy as jnp

from deepseek_jax.kernels.quantize import reference


def swiglu_quantize(gate, up, block, pow2_scales):
  gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
  return reference.quantize_both(gate / (1 + jnp.exp(-gate)) * up, block, pow2_scales)
