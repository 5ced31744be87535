"""Which FP8 GEMMs the Pallas kernels do. Operands are QTensors of arrays or of their ShapeDtypeStructs."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.kernels.implementations import SUPPORTED, Support, device_kind
from deepseek_jax.kernels.qtensor import FP8, QTensor
from deepseek_jax.kernels.tiles import BLOCK

TPU_LANES = 128


def pallas_tpu(function: str, a: QTensor, b: QTensor, out_dtype: DTypeLike) -> Support:
  return tpu_operands(a, b)


def pallas_gpu(function: str, a: QTensor, b: QTensor, out_dtype: DTypeLike) -> Support:
  return hopper_operands(a, b, (1, BLOCK), out_dtype)


def tpu_operands(a: QTensor, b: QTensor) -> Support:
  """For TPUs: the chip, the tiles and the dtypes of the operands."""
  kind, block = device_kind(), a.tile[1]
  if kind.startswith(("TPU v2", "TPU v3", "TPU v4")):
    return Support(f"{kind} has no products of float8_e4m3fn, TPU v5 and later have them")
  tiles_supported = a.tile[0] == 1 and b.tile[0] in (1, block) and block % TPU_LANES == 0
  if tiles_supported and (a.values.dtype, b.values.dtype) == (FP8, FP8):
    return SUPPORTED
  return Support(
    f"operands are {a.values.dtype} in tiles {a.tile} and {b.values.dtype} in tiles {b.tile}: the kernel for TPUs "
    f"multiplies float8_e4m3fn in tiles (1, block) by (block, block) or (1, block), block a multiple of {TPU_LANES}"
  )


def hopper_operands(a: QTensor, b: QTensor, b_tile_rows: tuple[int, ...], out_dtype: DTypeLike) -> Support:
  """For Hopper: the tiles and dtypes of the operands, those of `b` of one of `b_tile_rows` rows, and the result's dtype."""
  for name, q, tile_rows in (("a", a, (1,)), ("b", b, b_tile_rows)):
    if q.values.dtype != FP8 or q.tile[1] != BLOCK or q.tile[0] not in tile_rows or not q.values.size:
      return Support(
        f"{name}: kernels for Hopper multiply {jnp.dtype(FP8)} in tiles of {' or '.join(map(str, tile_rows))} x {BLOCK}, and this is "
        f"{q.values.dtype} {q.shape} in tiles of {q.tile[0]} x {q.tile[1]}"
      )
  if out_dtype not in (jnp.float32, jnp.bfloat16):
    return Support(f"Hopper kernels make float32 and bfloat16, not {jnp.dtype(out_dtype)}")
  return SUPPORTED
