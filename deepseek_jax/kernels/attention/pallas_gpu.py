"""tokamax's flash attention for Hopper: blocks of scores stay on the chip, forward and backward.

Its kernels are called directly, since its public function asks the local device. A segment is a run of positions, so
that a query sees the keys from its segment's first on, or from its window's. Forward, blocks that no query of a block sees are skipped;
backward they are masked.
"""

import functools
import importlib
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.kernels import _compat
from deepseek_jax.kernels.implementations import Unsupported, match_vma
from deepseek_jax.kernels.libraries import without_vma

TOKAMAX_VERSION = "0.0.17"  # exactly this: what is called here is internal to it
MODULES = "tokamax._src.ops.attention.pallas_mosaic_gpu"  # prefix of the modules of its kernels
# tokamax's own defaults for causal attention of these widths on Hopper; not measured by us. For context-parallel parts
# its default is a schedule that asks the local device.
FORWARD = {"block_q": 64, "block_kv": 128, "num_stages": 2}
BACKWARD = {"block_q_dkv": 64, "block_kv_dkv": 64, "block_q_dq": 64, "block_kv_dq": 64, "num_stages": 2}


def import_library() -> None:
  """Imports tokamax's kernels, where they are installed."""
  if installed_tokamax() == TOKAMAX_VERSION:
    importlib.import_module(f"{MODULES}_kernel_sm90")
    importlib.import_module(f"{MODULES}_vjp_kernel_sm90")


def attention(
  q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, scale: float, window: int
) -> jax.Array:
  _check_installed()
  starts = _window_starts(_segment_starts(segment_ids), jnp.arange(q.shape[1], dtype=jnp.int32), len(q), window)
  return _attention(scale, *match_vma(q, k, v, starts, None))


def attention_of_part(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: tuple[jax.Array, jax.Array] | None,
  scale: float,
  window: int,
  positions: np.ndarray,
  shard: int | jax.Array,
) -> jax.Array:
  _check_installed()
  q_positions = jnp.asarray(positions)[shard]
  starts = None if segment_ids is None else _segment_starts(segment_ids[1])[..., q_positions]
  starts = _window_starts(starts, q_positions, len(q), window)
  ends = jnp.broadcast_to(q_positions + 1, (q.shape[0], 1, q.shape[1]))
  return _attention(scale, *match_vma(q, k, v, starts, ends))


def _check_installed():
  _compat.check_mosaic_gpu()
  if (version := installed_tokamax()) != TOKAMAX_VERSION:
    raise Unsupported(
      f"attention on Hopper is that of tokamax {TOKAMAX_VERSION}, and here is {version or 'none'}: "
      f"pip install 'tokamax=={TOKAMAX_VERSION}'"
    )


def installed_tokamax() -> str | None:
  """The version of tokamax that is installed."""
  try:
    return importlib.metadata.version("tokamax")
  except importlib.metadata.PackageNotFoundError:
    return None


def _segment_starts(segment_ids):
  """[batch, 1, seq]: for each position the first of its segment."""
  if segment_ids is None:
    return None
  position = jax.lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
  is_first = jnp.ones_like(segment_ids[:, :1], bool)
  is_first = jnp.concatenate([is_first, segment_ids[:, 1:] != segment_ids[:, :-1]], 1)
  return jax.lax.cummax(jnp.where(is_first, position, 0), axis=1)[:, None]


def _window_starts(starts, q_positions, batch, window):
  """`starts` [batch, 1, queries] or None: the first key of each query, no earlier than the window's."""
  if not window:
    return starts
  first = jnp.broadcast_to(jnp.maximum(q_positions - (window - 1), 0), (batch, 1, len(q_positions)))
  return first if starts is None else jnp.maximum(starts, first)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(scale, q, k, v, starts, ends):
  """Each query sees the keys in [`starts`, `ends`), int32 [batch, 1, queries]; None: from 0, and up to itself."""
  return _attention_fwd(scale, q, k, v, starts, ends)[0]


def _attention_fwd(scale, q, k, v, starts, ends):
  from tokamax._src.ops.attention import pallas_mosaic_gpu_kernel_sm90 as sm90

  @without_vma
  @jax.vmap
  def kernel(q, k, v, starts, ends):
    return sm90.flash_attention_kernel(
      q, k, v, None, None, starts, ends,
      is_causal=ends is None, logits_scale=scale, logits_soft_cap=None, out_dtype=v.dtype, normalize_output=True,
      return_residuals=True, use_stable_softmax=True, rescale_threshold=1.0, config=sm90.Config(**FORWARD),
    )  # fmt: skip

  y, softmax_residuals = kernel(q, k, v, starts, ends)
  return y, (q, k, v, starts, ends, softmax_residuals, y)


def _attention_bwd(scale, residuals, dy):
  from tokamax._src.ops.attention import pallas_mosaic_gpu_vjp_kernel_sm90 as sm90

  @without_vma
  @jax.vmap
  def kernel(q, k, v, starts, ends, softmax_residuals, y, dy):
    return sm90.flash_attention_vjp_kernel(
      q, k, v, softmax_residuals, y, dy, None, None, starts, ends,
      is_causal=ends is None, logits_scale=scale, logits_soft_cap=None, ds_dtype=None, config=sm90.Config(**BACKWARD),
    )[:3]  # fmt: skip

  return *kernel(*residuals, dy), None, None


_attention.defvjp(_attention_fwd, _attention_bwd)
