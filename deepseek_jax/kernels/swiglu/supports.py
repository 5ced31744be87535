"""Which calls the Pallas kernels do: those of `quantize_both`, of which SwiGLU is the prologue."""

from typing import Any

import jax

from deepseek_jax.kernels.implementations import Support
from deepseek_jax.kernels.quantize import supports


def pallas_tpu(function: str, gate: jax.Array, up: jax.Array, block: int, *_: Any) -> Support:
  return supports.tpu_support([gate, up], block, gate.ndim == 2, (1, block))


def pallas_gpu(function: str, gate: jax.Array, up: jax.Array, block: int, *_: Any) -> Support:
  return supports.hopper_support([gate, up], (1, block), (1,))
