"""Products of rows, sorted by group, with their group's own matrix: the arithmetic of a mixture of experts.

`lax.ragged_dot` is this product, and on CPU and on TPUs other than v5p XLA expands it to every row times every matrix; on
GPUs it does so at least in the backward pass (reported by XLA's users, not measured by us). The blocked form does the useful
work alone: each block of rows belongs to one group, and a loop takes the blocks in use. On those TPUs, and on Hopper, jax's
kernels do.
"""

import functools

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.implementations import Unsupported, device_kind, is_hopper, log_once, vary


def block_rows(rows: int, groups: int) -> int:
  """Rows of a block for `rows` in all: about half a mean group, since each group is padded to whole blocks."""
  mean = max(rows // groups, 1)
  return min(max(1 << (mean.bit_length() - 2) if mean > 1 else 1, 8), 128)


def grouped_matmul(x, w, group_sizes, *, block, implementation="auto"):
  """`x` [rows, k] times `w` [groups, k, n], by group: [rows, n] in the dtype of `x`, accumulated in at least float32.

  Args:
    x: rows sorted by group; those past sum(group_sizes) belong to none and come out zero. rows is a multiple of `block`.
    group_sizes: [groups] int32, each a multiple of `block`.
    implementation: "blocked", "ragged_dot", "gmm" (for TPUs), "hopper", or "auto": the one that does no more than the useful
      work on this platform.

  Raises:
    ValueError: rows is not a multiple of `block`, or the named implementation does not do this.
  """
  if x.shape[0] % block:
    raise ValueError(f"x has {x.shape[0]} rows, which is not a multiple of block={block}: pad it")
  if implementation != "auto":
    return IMPLEMENTATIONS[implementation](x, w, group_sizes, block)
  kind = device_kind()
  if native(kind):
    return _ragged_dot(x, w, group_sizes, block)
  if kind.startswith("TPU") and x.dtype in (jnp.bfloat16, jnp.float32):
    return _gmm(x, w, group_sizes, block)
  if is_hopper(kind):
    try:
      return _hopper(x, w, group_sizes, block)
    except Unsupported as e:
      log_once(f"grouped_matmul: block by block, since {e}")
  return _blocked(x, w, group_sizes, block)


def native(device_kind) -> bool:
  """Whether devices of this kind multiply groups without waste."""
  # One chip, by its two names; v5e is "tpu v5 lite".
  return device_kind.lower() in ("tpu v5", "tpu v5p")


def _accumulated(x):
  """How products of `x` are made. Stated with each: backward passes are traced outside the model's matmul_precision."""
  precision = None if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
  return {"preferred_element_type": jnp.promote_types(x.dtype, jnp.float32), "precision": precision}


def _ragged_dot(x, w, group_sizes, block):
  return jax.lax.ragged_dot(x, w, group_sizes, **_accumulated(x)).astype(x.dtype)


def _blocked(x, w, group_sizes, block):
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


def _gmm(x, w, group_sizes, block):
  from deepseek_jax.kernels import megablox  # here, since Pallas adds 0.3 s to the start of a program

  return megablox.grouped_matmul(*vary(x, w, group_sizes))


def _hopper(x, w, group_sizes, block):
  from deepseek_jax.kernels import ragged_dot_gpu

  ragged_dot_gpu.check(x, w)
  return ragged_dot_gpu.grouped_matmul(*vary(x, w, group_sizes))


IMPLEMENTATIONS = {"blocked": _blocked, "ragged_dot": _ragged_dot, "gmm": _gmm, "hopper": _hopper}
