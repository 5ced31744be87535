"""jax's grouped products for TPUs: a visit of each tile of rows by each of the groups that have rows in it."""

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.implementations import Unsupported, vary
from deepseek_jax.kernels.libraries import library


def grouped_matmul(x, w, group_sizes, block):
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise Unsupported(f"megablox is for bfloat16 and float32, not {x.dtype}")
  return _product(*vary(x, w, group_sizes))


@jax.custom_vjp
def _product(x, w, group_sizes):
  """Of any group sizes."""
  return _forward(x, w, group_sizes)


def _forward(x, w, group_sizes, transposed=False):
  tile = _tile(x, w)
  sizes = tile[:1] + tile[:0:-1] if transposed else tile
  y = _library(x).gmm(_whole(x, tile), w, group_sizes, x.dtype, sizes, transpose_rhs=transposed)[: x.shape[0]]
  return jnp.where(jnp.arange(x.shape[0])[:, None] < group_sizes.sum(), y, 0)  # the others are as memory was


def _backward(residuals, dy):
  x, w, group_sizes = residuals
  tile = _tile(x, w)
  dw = _library(x).tgmm(_whole(x, tile).T, _whole(dy, tile), group_sizes, w.dtype, tile)
  return _forward(dy, w, group_sizes, transposed=True), dw, None


_product.defvjp(lambda *arrays: (_forward(*arrays), arrays), _backward)


def _library(x):
  return library("megablox.gmm", x.dtype.name)


def _tile(x, w):
  """(rows, terms, columns) that are multiplied at a time.

  Of rows at most half a mean group, since a tile that several groups share is multiplied for each; and at most 512, for
  which w is read about as fast as v6e and tpu7x multiply.
  """
  mean = max(x.shape[0] // w.shape[0], 2)
  rows = min(max(1 << (mean.bit_length() - 2), 128), 512)
  return min(rows, x.shape[0]), *(min(size, 1024) for size in w.shape[1:])


def _whole(x, tile):
  """`x` [rows, ..] in a whole number of tiles."""
  return jnp.pad(x, ((0, -x.shape[0] % tile[0]), (0, 0)))
