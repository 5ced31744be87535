"""jax's megablox for TPUs: each tile of rows is visited once for each group that has rows in it."""

import jax

from deepseek_jax.kernels.grouped_matmul.padding import pad_rows, zero_ungrouped_rows
from deepseek_jax.kernels.implementations import match_vma
from deepseek_jax.kernels.libraries import tpu_library


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, block: int) -> jax.Array:
  return _ragged_matmul(*match_vma(x, w, group_sizes))


@jax.custom_vjp
def _ragged_matmul(x, w, group_sizes):
  """`grouped_matmul` for any group sizes."""
  return _grouped_matmul_fwd(x, w, group_sizes)


def _grouped_matmul_fwd(x, w, group_sizes, transpose_rhs=False):
  tile_m, tile_k, tile_n = _tiling(x, w)
  tiling = (tile_m, tile_n, tile_k) if transpose_rhs else (tile_m, tile_k, tile_n)
  y = _megablox(x).gmm(pad_rows(x, tile_m), w, group_sizes, x.dtype, tiling, transpose_rhs=transpose_rhs)
  return zero_ungrouped_rows(y[: x.shape[0]], group_sizes)


def _grouped_matmul_bwd(residuals, dy):
  x, w, group_sizes = residuals
  tiling = _tiling(x, w)
  tile_m = tiling[0]
  dw = _megablox(x).tgmm(pad_rows(x, tile_m).T, pad_rows(dy, tile_m), group_sizes, w.dtype, tiling)
  return _grouped_matmul_fwd(dy, w, group_sizes, transpose_rhs=True), dw, None


_ragged_matmul.defvjp(lambda *arrays: (_grouped_matmul_fwd(*arrays), arrays), _grouped_matmul_bwd)


def _megablox(x):
  return tpu_library("megablox.gmm", x.dtype.name)


def _tiling(x, w):
  """(m, k, n) of a tile.

  m is at most half a mean group, since a tile that several groups share is multiplied for each. It is at most 512, for
  which w is read about as fast as v6e and tpu7x multiply.
  """
  mean = max(x.shape[0] // w.shape[0], 2)
  rows = min(max(1 << (mean.bit_length() - 2), 128), 512)
  return min(rows, x.shape[0]), *(min(size, 1024) for size in w.shape[1:])
