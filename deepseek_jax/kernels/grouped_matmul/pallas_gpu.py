"""jax's grouped products for Hopper GPUs: each multiprocessor takes tiles of the result, of one group's rows each."""

import types

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

from deepseek_jax.kernels import _compat
from deepseek_jax.kernels.implementations import Unsupported, vary
from deepseek_jax.kernels.libraries import again, untyped
from deepseek_jax.kernels.tiles import MULTIPROCESSORS

# Of the tiles that jax tries, the largest whose sums fit a warpgroup's registers; not measured by us.
ROWS, COLUMNS, TERMS = 128, 128, 64
TILES = {"max_concurrent_steps": 4, "grid_block_n": 1}
# It asks the device that is here how many multiprocessors there are, and the program may be for others.
_transposed = again("jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu")
_device = types.SimpleNamespace(core_count=MULTIPROCESSORS)
_transposed.jax = types.SimpleNamespace(**vars(jax) | {"devices": lambda: [_device]})


def grouped_matmul(x, w, group_sizes, block):
  _compat.check_mosaic_gpu()
  if not x.dtype == w.dtype == jnp.bfloat16:
    raise Unsupported(f"grouped products on Hopper are for bfloat16, not {x.dtype} and {w.dtype}")
  if any(size % COLUMNS for size in w.shape[1:]):
    raise Unsupported(f"grouped products on Hopper are for widths that are multiples of {COLUMNS}, not {w.shape[1:]}")
  return _product(*vary(x, w, group_sizes))


@jax.custom_vjp
def _product(x, w, group_sizes):
  """Of any group sizes."""
  return _forward(x, w, group_sizes)


def _forward(x, w, group_sizes, transposed=False):
  how = {"block_m": ROWS, "block_n": COLUMNS, "block_k": TERMS, "transpose_rhs": transposed, **TILES}
  product = untyped(lambda x, w, sizes: ragged_dot(x, w, group_sizes=sizes, **how))
  y = product(_whole(x), w, group_sizes)[: x.shape[0]]
  return jnp.where(jnp.arange(x.shape[0])[:, None] < group_sizes.sum(), y, 0)  # the others are as memory was


def _backward(residuals, dy):
  x, w, group_sizes = residuals
  how = {"block_m": COLUMNS, "block_n": COLUMNS, "block_k": TERMS, **TILES}
  product = untyped(lambda x, dy, sizes: _transposed.transposed_ragged_dot(x, dy, group_sizes=sizes, **how))
  return _forward(dy, w, group_sizes, transposed=True), product(_whole(x), _whole(dy), group_sizes), None


_product.defvjp(lambda *arrays: (_forward(*arrays), arrays), _backward)


def _whole(x):
  """`x` [rows, ..] in a whole number of tiles."""
  return jnp.pad(x, ((0, -x.shape[0] % ROWS), (0, 0)))
