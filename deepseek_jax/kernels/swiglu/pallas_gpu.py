"""The quantiser's kernel, of the product."""

import jax

from deepseek_jax.kernels import hopper_tiles


def swiglu_quantize(gate, up, block, pow2):
  return hopper_tiles.rounded_both(lambda gate, up: jax.nn.silu(gate) * up, [gate, up], block, pow2)
