"""Block by block: each block of rows belongs to one group, and a loop takes the blocks in use.

`lax.ragged_dot` is this product, and on CPU and on TPUs other than v5p XLA expands it to every row times every matrix; on
GPUs it does so at least in the backward pass (reported by XLA's users, not measured by us). Blocks do the useful work alone.
"""

import functools

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.implementations import device_kind, vary


def grouped_matmul(x, w, group_sizes, block):
  return (ragged_dot if has_ragged_dot(device_kind()) else blocked)(x, w, group_sizes, block)


def has_ragged_dot(device_kind) -> bool:
  """Whether XLA multiplies groups without waste on devices of this kind."""
  # One chip, by its two names; v5e is "tpu v5 lite".
  return device_kind.lower() in ("tpu v5", "tpu v5p")


def _accumulated(x):
  """How products of `x` are made. Stated with each: backward passes are traced outside the model's matmul_precision."""
  precision = None if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
  return {"preferred_element_type": jnp.promote_types(x.dtype, jnp.float32), "precision": precision}


def ragged_dot(x, w, group_sizes, block):
  return jax.lax.ragged_dot(x, w, group_sizes, **_accumulated(x)).astype(x.dtype)


def blocked(x, w, group_sizes, block):
  return _blocked_product(*vary(x, w, group_sizes), block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked_product(x, w, group_sizes, block):
  return _rows_times(x, w, group_sizes, block, "rk,kn->rn")


def _rows_times(x, w, group_sizes, block, equation):
  """Each block of `x` times the matrix of its group, which `equation` may transpose."""
  group_of = _group_of_block(group_sizes, x.shape[0] // block, block)
  width = jax.eval_shape(functools.partial(jnp.einsum, equation), x, w[0]).shape[1]

  def body(i, y):
    rows = jax.lax.dynamic_slice_in_dim(x, i * block, block)
    product = jnp.einsum(equation, rows, w[group_of[i]], **_accumulated(x)).astype(x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(y, product, i * block, 0)

  # A zero that varies over the devices as x does.
  zeros = jnp.zeros((x.shape[0], width), x.dtype) + 0 * x[:1, :1]
  return jax.lax.fori_loop(0, group_sizes.sum() // block, body, zeros)


def _forward(x, w, group_sizes, block):
  return _blocked_product(x, w, group_sizes, block), (x, w, group_sizes)


def _backward(block, residuals, dy):
  x, w, group_sizes = residuals
  group_of = _group_of_block(group_sizes, x.shape[0] // block, block)

  def body(i, dw):
    rows, d = (jax.lax.dynamic_slice_in_dim(a, i * block, block) for a in (x, dy))
    return dw.at[group_of[i]].add(jnp.einsum("rk,rn->kn", rows, d, **_accumulated(x)))  # in place

  dx = _rows_times(dy, w, group_sizes, block, "rn,kn->rk")
  dw = jax.lax.fori_loop(0, group_sizes.sum() // block, body, 0 * w.astype(jnp.promote_types(w.dtype, jnp.float32)))
  return dx, dw.astype(w.dtype), None


_blocked_product.defvjp(_forward, _backward)


def _group_of_block(group_sizes, blocks, block):
  """[blocks] int32: the group that each block belongs to."""
  ends = jnp.cumsum(group_sizes) // block
  return jnp.searchsorted(ends, jnp.arange(blocks), side="right").astype(jnp.int32)
