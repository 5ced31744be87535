"""The quantiser's kernel, which reads both halves."""

import jax

from deepseek_jax.kernels.quantize import pallas_tpu


def swiglu_quantize(gate, up, block, pow2):
  return pallas_tpu.both([gate, up], lambda gate, up: jax.nn.silu(gate) * up, block, pow2)
