"""jax's ragged_dot for Hopper GPUs: each multiprocessor takes output tiles, each of one group's rows."""

import types

import jax
from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

from deepseek_jax.kernels import _compat
from deepseek_jax.kernels.grouped_matmul.padding import pad_rows, zero_ungrouped_rows
from deepseek_jax.kernels.grouped_matmul.supports import HOPPER_WIDTH_MULTIPLE
from deepseek_jax.kernels.implementations import match_vma
from deepseek_jax.kernels.libraries import import_copy, without_vma
from deepseek_jax.kernels.tiles import MULTIPROCESSORS

# Of the tiles that jax tries, the largest whose accumulators fit a warpgroup's registers; not measured by us.
BLOCK_M, BLOCK_N, BLOCK_K = 128, HOPPER_WIDTH_MULTIPLE, 64
TILING = {"max_concurrent_steps": 4, "grid_block_n": 1}
# The module asks the local device for its number of multiprocessors, and the program may be for others.
_transposed_ragged_dot = import_copy("jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu")
_device = types.SimpleNamespace(core_count=MULTIPROCESSORS)
_transposed_ragged_dot.jax = types.SimpleNamespace(**vars(jax) | {"devices": lambda: [_device]})


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, block: int) -> jax.Array:
  _compat.check_mosaic_gpu()
  return _ragged_matmul(*match_vma(x, w, group_sizes))


@jax.custom_vjp
def _ragged_matmul(x, w, group_sizes):
  """`grouped_matmul` for any group sizes."""
  return _grouped_matmul_fwd(x, w, group_sizes)


def _grouped_matmul_fwd(x, w, group_sizes, transpose_rhs=False):
  blocks = {"block_m": BLOCK_M, "block_n": BLOCK_N, "block_k": BLOCK_K, "transpose_rhs": transpose_rhs, **TILING}
  kernel = without_vma(lambda x, w, sizes: ragged_dot(x, w, group_sizes=sizes, **blocks))
  y = kernel(pad_rows(x, BLOCK_M), w, group_sizes)[: x.shape[0]]
  return zero_ungrouped_rows(y, group_sizes)


def _grouped_matmul_bwd(residuals, dy):
  x, w, group_sizes = residuals
  blocks = {"block_m": BLOCK_N, "block_n": BLOCK_N, "block_k": BLOCK_K, **TILING}
  kernel = without_vma(
    lambda x, dy, sizes: _transposed_ragged_dot.transposed_ragged_dot(x, dy, group_sizes=sizes, **blocks)
  )
  dx = _grouped_matmul_fwd(dy, w, group_sizes, transpose_rhs=True)
  return dx, kernel(pad_rows(x, BLOCK_M), pad_rows(dy, BLOCK_M), group_sizes), None


_ragged_matmul.defvjp(lambda *arrays: (_grouped_matmul_fwd(*arrays), arrays), _grouped_matmul_bwd)
