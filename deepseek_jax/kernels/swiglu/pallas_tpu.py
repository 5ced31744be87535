"""The quantiser's kernel, which reads both halves."""

from deepseek_jax.kernels.quantize import pallas_tpu
from deepseek_jax.kernels.swiglu.xla import swiglu


def swiglu_quantize(gate, up, block, pow2_scales):
  return pallas_tpu.both([gate, up], swiglu, block, pow2_scales)
