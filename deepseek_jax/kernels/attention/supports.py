"""Which calls of attention the Pallas kernels do. Operands are arrays or their ShapeDtypeStructs."""

from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.implementations import SUPPORTED, Support

SEQ_MULTIPLE = 128  # TPUs: lanes; Hopper: two warpgroups of 64 queries, or of 64 keys backward
HOPPER_MAX_WIDTHS = 192, 128  # of keys and of values: more does not fit on the chip


def pallas_tpu(function: str, q: jax.Array, k: jax.Array, v: jax.Array, *_: Any) -> Support:
  """Of jax's splash attention."""
  if q.dtype not in (jnp.bfloat16, jnp.float32):
    return Support(f"splash attention is for bfloat16 and float32, not {q.dtype}")
  if q.shape[1] % SEQ_MULTIPLE:
    return Support(f"splash attention is for a multiple of {SEQ_MULTIPLE} positions on each device, not {q.shape[1]}")
  return SUPPORTED


def pallas_gpu(function: str, q: jax.Array, k: jax.Array, v: jax.Array, *_: Any) -> Support:
  """Of tokamax's attention for Hopper, where it is installed."""
  if any(x.dtype != jnp.bfloat16 for x in (q, k, v)):
    return Support(f"tokamax's attention is for bfloat16, not {q.dtype}, {k.dtype} and {v.dtype}")
  if q.shape[1] % SEQ_MULTIPLE or k.shape[1] % SEQ_MULTIPLE:
    return Support(
      f"tokamax's attention is for a multiple of {SEQ_MULTIPLE} positions on each device, not {q.shape[1]} and {k.shape[1]}"
    )
  if k.shape[-1] > HOPPER_MAX_WIDTHS[0] or v.shape[-1] > HOPPER_MAX_WIDTHS[1]:
    return Support(f"tokamax's attention is for widths up to {HOPPER_MAX_WIDTHS}, not {k.shape[-1]} and {v.shape[-1]}")
  return SUPPORTED
