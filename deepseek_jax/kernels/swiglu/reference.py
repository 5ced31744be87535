"""SwiGLU by its definition, then the reference quantization."""

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.qtensor import QTensor
from deepseek_jax.kernels.quantize import reference


def swiglu_quantize(gate: jax.Array, up: jax.Array, block: int, pow2_scales: bool) -> tuple[QTensor, QTensor]:
  gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
  return reference.quantize_both(gate / (1 + jnp.exp(-gate)) * up, block, pow2_scales)
