"""Names that differ between the versions of jax that run here."""

import jax

from deepseek_jax.kernels.implementations import Unsupported


def check_mosaic_gpu():
  """Raises Unsupported where this jax is older than what the kernels for GPUs are written for."""
  if jax.__version_info__ < (0, 11):
    raise Unsupported(f"kernels for Hopper need jax 0.11 or newer, and this is {jax.__version__}")


def store(ref, value):
  """`value` into all of `ref` in a GPU's shared memory, in an order that may cost bank conflicts."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  if hasattr(plgpu, "store"):  # jax 0.12
    plgpu.store(ref, value, optimized=False)
  else:
    ref[...] = value
