"""Which grouped matmuls the Pallas kernels do. Operands are arrays or their ShapeDtypeStructs."""

from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.implementations import SUPPORTED, Support

HOPPER_WIDTH_MULTIPLE = 128  # columns of a tile


def pallas_tpu(function: str, x: jax.Array, w: jax.Array, *_: Any) -> Support:
  """Of jax's megablox."""
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    return Support(f"megablox is for bfloat16 and float32, not {x.dtype}")
  return SUPPORTED


def pallas_gpu(function: str, x: jax.Array, w: jax.Array, *_: Any) -> Support:
  """Of jax's ragged_dot for Hopper."""
  if not x.dtype == w.dtype == jnp.bfloat16:
    return Support(f"grouped matmuls on Hopper are for bfloat16, not {x.dtype} and {w.dtype}")
  if any(size % HOPPER_WIDTH_MULTIPLE for size in w.shape[1:]):
    return Support(
      f"grouped matmuls on Hopper are for widths that are multiples of {HOPPER_WIDTH_MULTIPLE}, not {w.shape[1:]}"
    )
  return SUPPORTED
