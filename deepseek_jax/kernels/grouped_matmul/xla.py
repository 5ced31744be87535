"""Grouped matmul without a kernel: a loop over the blocks of rows in use, each of one group.

`lax.ragged_dot` is this operation. XLA expands it to every row times every matrix on CPU and on TPUs other than v5p,
and on GPUs at least in the backward pass (reported by XLA's users, not measured by us). The loop does no such extra
work.
"""

import functools

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.implementations import accumulation, device_kind, has_ragged_dot, match_vma


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, block: int) -> jax.Array:
  return (ragged_dot if has_ragged_dot(device_kind()) else blocked_matmul)(x, w, group_sizes, block)


def ragged_dot(x: jax.Array, w: jax.Array, group_sizes: jax.Array, block: int) -> jax.Array:
  """`grouped_matmul` by XLA's operation, for any group sizes; `block` is not used."""
  return jax.lax.ragged_dot(x, w, group_sizes, **accumulation(x)).astype(x.dtype)


def blocked_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, block: int) -> jax.Array:
  """`grouped_matmul` by the loop over blocks."""
  return _blocked_matmul(*match_vma(x, w, group_sizes), block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked_matmul(x, w, group_sizes, block):
  return _multiply_blocks(x, w, group_sizes, block, "rk,kn->rn")


def _multiply_blocks(x, w, group_sizes, block, equation):
  """Each block of `x` times the matrix of its group, which `equation` may transpose."""
  group_ids = _block_group_ids(group_sizes, x.shape[0] // block, block)
  width = jax.eval_shape(functools.partial(jnp.einsum, equation), x, w[0]).shape[1]

  def body(i, y):
    rows = jax.lax.dynamic_slice_in_dim(x, i * block, block)
    product = jnp.einsum(equation, rows, w[group_ids[i]], **accumulation(x)).astype(x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(y, product, i * block, 0)

  # A zero that varies over the devices as x does.
  zeros = jnp.zeros((x.shape[0], width), x.dtype) + 0 * x[:1, :1]
  return jax.lax.fori_loop(0, group_sizes.sum() // block, body, zeros)


def _grouped_matmul_fwd(x, w, group_sizes, block):
  return _blocked_matmul(x, w, group_sizes, block), (x, w, group_sizes)


def _grouped_matmul_bwd(block, residuals, dy):
  x, w, group_sizes = residuals
  group_ids = _block_group_ids(group_sizes, x.shape[0] // block, block)

  def body(i, dw):
    x_block, dy_block = (jax.lax.dynamic_slice_in_dim(a, i * block, block) for a in (x, dy))
    return dw.at[group_ids[i]].add(jnp.einsum("rk,rn->kn", x_block, dy_block, **accumulation(x)))  # in place

  dx = _multiply_blocks(dy, w, group_sizes, block, "rn,kn->rk")
  dw = jax.lax.fori_loop(0, group_sizes.sum() // block, body, 0 * w.astype(jnp.promote_types(w.dtype, jnp.float32)))
  return dx, dw.astype(w.dtype), None


_blocked_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)


def _block_group_ids(group_sizes, blocks, block):
  """[blocks] int32: the group that each block belongs to."""
  ends = jnp.cumsum(group_sizes) // block
  return jnp.searchsorted(ends, jnp.arange(blocks), side="right").astype(jnp.int32)
