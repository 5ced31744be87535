"""The quantiser's kernel, of the product."""

from deepseek_jax.kernels import hopper_tiles
from deepseek_jax.kernels.swiglu.xla import swiglu


def swiglu_quantize(gate, up, block, pow2_scales):
  return hopper_tiles.rounded_both(swiglu, [gate, up], block, pow2_scales)
