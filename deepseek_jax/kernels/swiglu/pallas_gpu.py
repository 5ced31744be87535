"""The quantization kernel for Hopper GPUs, with SwiGLU as its prologue."""

import jax

from deepseek_jax.kernels import hopper_quantize
from deepseek_jax.kernels.qtensor import QTensor
from deepseek_jax.kernels.swiglu.xla import swiglu_float32


def swiglu_quantize(gate: jax.Array, up: jax.Array, block: int, pow2_scales: bool) -> tuple[QTensor, QTensor]:
  return hopper_quantize.apply_and_quantize_both_hopper(swiglu_float32, [gate, up], block, pow2_scales)
