"""Which quantizations the Pallas kernels do. Operands are arrays or their ShapeDtypeStructs."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.implementations import SUPPORTED, Support
from deepseek_jax.kernels.tiles import BLOCK

TPU_LANES = 128


def pallas_tpu(function: str, x: jax.Array, tile: tuple[int, int] | int, *_: Any) -> Support:
  """tile: of `quantize`; the block of `quantize_both`."""
  if isinstance(tile, int):
    return tpu_support([x], tile, x.ndim == 2, (1, tile))
  return tpu_support([x], tile[1], tile[0] in (1, tile[1]), tile)


def pallas_gpu(function: str, x: jax.Array, tile: tuple[int, int] | int, *_: Any) -> Support:
  """tile: as in `pallas_tpu`."""
  is_square = not isinstance(tile, int) and tile[0] > 1
  return hopper_support([x], (1, tile) if isinstance(tile, int) else tile, (BLOCK,) if is_square else (1,))


def tpu_support(inputs: Sequence[jax.Array], block: int, tile_supported: bool, tile: tuple[int, int]) -> Support:
  """For TPUs: whether `inputs` are quantized in a `tile` of `block` columns."""
  dtypes_supported = all(x.dtype in (jnp.float32, jnp.bfloat16) for x in inputs)
  if tile_supported and block % TPU_LANES == 0 and dtypes_supported:
    return SUPPORTED
  return Support(
    f"operands are {inputs[0].dtype}{list(inputs[0].shape)} in tiles {tile}: the kernel for TPUs reads float32 and "
    f"bfloat16, in tiles (1, block) or (block, block), block a multiple of {TPU_LANES}"
  )


def hopper_support(inputs: Sequence[jax.Array], tile: tuple[int, int], rows: tuple[int, ...]) -> Support:
  """For Hopper: whether `inputs` are quantized in a `tile`, of one of `rows` rows."""
  if tile[1] != BLOCK or tile[0] not in rows:
    return Support(f"kernels for Hopper quantize tiles of {rows[0]} x {BLOCK}, not {tile[0]} x {tile[1]}")
  for x in inputs:
    if x.dtype not in (jnp.bfloat16, jnp.float32) or not x.size:
      return Support(f"kernels for Hopper quantize float32 and bfloat16, not {x.dtype} {x.shape}")
  return SUPPORTED
