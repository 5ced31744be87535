"""Names that differ between the versions of jax that run here."""

from typing import Any

import jax

from deepseek_jax.kernels.implementations import Unsupported

# A Pallas reference to memory, or a part of one. Pallas has no public type for it.
Ref = Any


def check_mosaic_gpu() -> None:
  """Raises Unsupported where this jax is older than what the kernels for GPUs are written for."""
  if jax.__version_info__ < (0, 11):
    raise Unsupported(f"kernels for Hopper need jax 0.11 or newer, and this is {jax.__version__}")


def load_smem(ref: Ref, layout: Any, **options: Any) -> jax.Array:
  """All of `ref` in a GPU's shared memory, in registers of `layout`. jax 0.10's annotation requires an index."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  load: Any = plgpu.load
  return load(ref, layout=layout, **options)


def store_smem(ref: Ref, value: jax.Array) -> None:
  """Stores `value` into all of `ref` in a GPU's shared memory, in an order that may cost bank conflicts."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  if hasattr(plgpu, "store"):  # jax 0.12
    plgpu.store(ref, value, optimized=False)
  else:
    ref[...] = value
