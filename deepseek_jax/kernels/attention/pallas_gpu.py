"""tokamax's flash attention for Hopper: blocks of scores stay on the chip, forward and backward.

Its kernels are called as they are, without its interface, which looks at the devices that are here. Segments are runs of
positions, so that a query sees keys from its segment's first on; forward, blocks before those of all its neighbours are
passed over, backward they are masked.
"""

import functools
import importlib
import importlib.metadata

import jax
import jax.numpy as jnp

from deepseek_jax.kernels import _compat
from deepseek_jax.kernels.implementations import Unsupported, vary
from deepseek_jax.kernels.libraries import untyped

TOKAMAX = "0.0.17"  # not any: what is called here is internal to it
KERNELS = "tokamax._src.ops.attention.pallas_mosaic_gpu"
ROWS = 128  # two warpgroups of 64 queries, or of 64 keys backward
WIDTHS = 192, 128  # of keys and of values, at most: more has no room on the chip
# What tokamax takes of itself for causal attention of these widths on Hopper; not measured by us. For parts it would take a
# schedule that asks the device that is here.
FORWARD = {"block_q": 64, "block_kv": 128, "num_stages": 2}
BACKWARD = {"block_q_dkv": 64, "block_kv_dkv": 64, "block_q_dq": 64, "block_kv_dq": 64, "num_stages": 2}


def import_library():
  """Imports tokamax's kernels, where they are installed."""
  if _installed() == TOKAMAX:
    importlib.import_module(f"{KERNELS}_kernel_sm90")
    importlib.import_module(f"{KERNELS}_vjp_kernel_sm90")


def attention(q, k, v, segment_ids, scale):
  _check(q, k, v)
  return _attention(scale, *vary(q, k, v, _starts(segment_ids), None))


def attention_of_part(q, k, v, segment_ids, scale, positions, part):
  _check(q, k, v)
  own = jnp.asarray(positions)[part]
  starts = None if segment_ids is None else _starts(segment_ids[1])[..., own]
  ends = jnp.broadcast_to(own + 1, (q.shape[0], 1, q.shape[1]))
  return _attention(scale, *vary(q, k, v, starts, ends))


def _check(q, k, v):
  _compat.check_mosaic_gpu()
  if (found := _installed()) != TOKAMAX:
    raise Unsupported(
      f"attention on Hopper is that of tokamax {TOKAMAX}, and here is {found or 'none'}: pip install 'tokamax=={TOKAMAX}'"
    )
  if any(x.dtype != jnp.bfloat16 for x in (q, k, v)):
    raise Unsupported(f"tokamax's attention is for bfloat16, not {q.dtype}, {k.dtype} and {v.dtype}")
  if q.shape[1] % ROWS or k.shape[1] % ROWS:
    raise Unsupported(
      f"tokamax's attention is for a multiple of {ROWS} positions on each device, not {q.shape[1]} and {k.shape[1]}"
    )
  if k.shape[-1] > WIDTHS[0] or v.shape[-1] > WIDTHS[1]:
    raise Unsupported(f"tokamax's attention is for widths up to {WIDTHS}, not {k.shape[-1]} and {v.shape[-1]}")


def _installed():
  try:
    return importlib.metadata.version("tokamax")
  except importlib.metadata.PackageNotFoundError:
    return None


def _starts(segment_ids):
  """[batch, 1, seq]: of each position the first of its segment."""
  if segment_ids is None:
    return None
  position = jax.lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
  first = jnp.ones_like(segment_ids[:, :1], bool)
  first = jnp.concatenate([first, segment_ids[:, 1:] != segment_ids[:, :-1]], 1)
  return jax.lax.cummax(jnp.where(first, position, 0), axis=1)[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(scale, q, k, v, starts, ends):
  """Of each query the keys from `starts` to before `ends`, int32 [batch, 1, queries]; None: all, and all not after it."""
  return _forward(scale, q, k, v, starts, ends)[0]


def _forward(scale, q, k, v, starts, ends):
  from tokamax._src.ops.attention import pallas_mosaic_gpu_kernel_sm90 as sm90

  @untyped
  @jax.vmap
  def kernel(q, k, v, starts, ends):
    return sm90.flash_attention_kernel(
      q, k, v, None, None, starts, ends,
      is_causal=ends is None, logits_scale=scale, logits_soft_cap=None, out_dtype=v.dtype, normalize_output=True,
      return_residuals=True, use_stable_softmax=True, rescale_threshold=1.0, config=sm90.Config(**FORWARD),
    )  # fmt: skip

  y, softmax = kernel(q, k, v, starts, ends)
  return y, (q, k, v, starts, ends, softmax, y)


def _backward(scale, kept, dy):
  from tokamax._src.ops.attention import pallas_mosaic_gpu_vjp_kernel_sm90 as sm90

  @untyped
  @jax.vmap
  def kernel(q, k, v, starts, ends, softmax, y, dy):
    return sm90.flash_attention_vjp_kernel(
      q, k, v, softmax, y, dy, None, None, starts, ends,
      is_causal=ends is None, logits_scale=scale, logits_soft_cap=None, ds_dtype=None, config=sm90.Config(**BACKWARD),
    )[:3]  # fmt: skip

  return *kernel(*kept, dy), None, None


_attention.defvjp(_forward, _backward)
