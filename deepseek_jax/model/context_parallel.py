"""Context parallelism: causal attention to a sequence that C devices share, each with an equal part of the causal half.

The sequence is cut into 2C chunks of L positions. Device c holds chunk c, its early chunk, and chunk 2C-1-c, its late
one (Llama 3, arXiv 2407.21783, section 3.3.2). Of the (2C)^2 pairs of a query chunk and a key chunk, each device
computes 2C+1: 3 of its own chunks, and 2 with those of each other device. Pairs are merged as in an online softmax.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.kernels.attention.api import attention_of_part
from deepseek_jax.model.linear import at_least_float32
from deepseek_jax.typing import PyTree

EARLY, LATE = 0, 1
OWN_PAIRS = ((EARLY, EARLY), (LATE, LATE), (LATE, EARLY))  # (query chunk, key chunk)

# kv -> (keys [batch, n, kv_heads, key width], values [batch, n, kv_heads, value width]).
ExpandKV = Callable[[Any], tuple[jax.Array, jax.Array]]
# What a device holds and sends: (kv, its segment_ids or None).
KVShard = tuple[PyTree, jax.Array | None]
# Of an online softmax: largest logit [..., heads, L], denominator [..., heads, L],
# numerator [..., heads, L, value width].
SoftmaxState = tuple[jax.Array, jax.Array, jax.Array]


def zigzag(seq: int, devices: int) -> np.ndarray:
  """Positions that each of `devices` holds: int32 [devices, seq / devices].

  Raises:
    ValueError: `seq` has no 2 * devices equal chunks (one device may have any length).
  """
  if devices == 1:
    return np.arange(seq, dtype=np.int32)[None]
  if seq % (2 * devices):
    raise ValueError(f"a sequence of {seq} positions over {devices} devices: it must be divisible by {2 * devices}")
  chunks = np.arange(seq, dtype=np.int32).reshape(2 * devices, -1)
  return np.concatenate([chunks[:devices], chunks[: devices - 1 : -1]], 1)


def chunk_pairs(
  source: int | jax.Array, device: int | jax.Array
) -> tuple[tuple[int, int], tuple[int | jax.Array, int | jax.Array]]:
  """(query chunk, key chunk) of the two pairs that `device` computes with the keys of another device, `source`.

  - Late queries attend to every early key.
  - A later device has a later early chunk and an earlier late chunk. Of the pairs of like chunks, one is attended to in
    full and one not at all.

  The devices may be traced: there are two pairs in any case.
  """
  like = (source > device) * LATE
  return (LATE, EARLY), (like, like)


def chunk_distance(device: jax.Array, source: jax.Array, pair: jax.Array, devices: int) -> jax.Array:
  """Chunks of the sequence from a key chunk of `source` to a query chunk of `device`, for a (query, key) `pair`."""

  def index(device, chunk):
    return jnp.where(chunk == EARLY, device, 2 * devices - 1 - device)

  return index(device, pair[0]) - index(source, pair[1])


def context_parallel_attention(
  q: jax.Array,
  kv: PyTree,
  expand_kv: ExpandKV,
  *,
  scale: float,
  axis: str,
  kind: str,
  segment_ids: jax.Array | None = None,
  window: int = 0,
) -> jax.Array:
  """Causal attention to the whole sequence, inside `spmd`. Each device holds the positions of `zigzag`.

  The backward pass recomputes each pair's logits from `q` and `kv`. Gradients of `kv` go back to the device that `kv`
  came from, in its dtype. Until then, each device keeps the `kv` of all, which is small in MLA.

  Args:
    q: [batch, seq / C, heads, key width].
    kv: tree of arrays [batch, seq / C, ...], which devices exchange.
    expand_kv: keys and values of `kv`, of any number of positions. It runs 2C+1 times, for seq / 2C positions each, and
      again in the backward pass: all-gather its weights before, not in it.
    scale: factor of the logits.
    axis: mesh axis that shares the sequence, of C > 1 devices.
    kind: of KV_COMM: how `kv` is exchanged.
    segment_ids: int [batch, seq / C]; positions attend within their segment only.
    window: keys that a query sees, itself included; 0: all up to itself. Pairs of chunks that the window masks as a
      whole are computed too: devices keep equal work, and no less of it.

  Returns:
    [batch, seq / C, heads, value width] in the dtype of `q`, which keys and values share.
  """
  device, own_shard = jax.lax.axis_index(axis), (kv, segment_ids)

  def attend_pair(shard, source, pair, own):
    # The chunks are sliced inside the checkpoint, so that it saves one `q` and one `shard`, and no copy for each pair.
    attend = functools.partial(_attend_pair, expand_kv, scale, window, own)
    distance = chunk_distance(device, source, pair, jax.lax.axis_size(axis)) if window else None
    return jax.checkpoint(attend, prevent_cse=False)(q, segment_ids, shard, pair, distance)

  # Loops, so that the logits of one pair exist at a time. The first two results start the states of both query chunks.
  own = jax.lax.map(lambda pair: attend_pair(own_shard, device, pair, own=True), jnp.array(OWN_PAIRS))
  state = _merge(jax.tree.map(lambda x: x[:2], own), LATE, jax.tree.map(lambda x: x[2], own))

  def attend_shard(state, source, shard):
    def attend(state, pair):
      return _merge(state, pair[0], attend_pair(shard, source, pair, own=False)), None

    return jax.lax.scan(attend, state, jnp.array(chunk_pairs(source, device)))[0]

  _, denominator, numerator = KV_COMM[kind](state, attend_shard, own_shard, axis)
  y = numerator / denominator[..., None]  # [2, batch, heads, L, value width]
  y = y.transpose(1, 0, 3, 2, 4).reshape(*q.shape[:3], -1)  # [batch, 2 L, heads, value width]
  # The barrier: libtpu 0.0.50 fails a check where it fuses this transpose with the matrix product that follows.
  return jax.lax.optimization_barrier(y.astype(q.dtype))


def all_gather_kv_attention(
  q: jax.Array,
  kv: PyTree,
  expand_kv: ExpandKV,
  *,
  scale: float,
  axis: str,
  segment_ids: jax.Array | None = None,
  window: int = 0,
  implementation: str = "auto",
  fallback: Callable[[], jax.Array] | None = None,
) -> jax.Array:
  """As `context_parallel_attention`, by a kernel that skips masked blocks.

  Keys and values of the whole sequence are in memory. implementation, fallback: as in `call_kernel`.
  """

  def gather(x):
    return _undo_zigzag(jax.lax.all_gather(x, axis))

  segments = None if segment_ids is None else (segment_ids, gather(segment_ids))
  k, v = expand_kv(jax.tree.map(gather, kv))
  positions, device = zigzag(k.shape[1], jax.lax.axis_size(axis)), jax.lax.axis_index(axis)
  return attention_of_part(
    q, k, v, positions, device,
    scale=scale, segment_ids=segments, window=window, implementation=implementation, fallback=fallback,
  )  # fmt: skip


def _undo_zigzag(gathered: jax.Array) -> jax.Array:
  """[batch, seq, ...] in the order of positions, of the devices' shards [C, batch, seq / C, ...]."""
  early, late = jnp.split(gathered, 2, 2)
  chunks = jnp.moveaxis(jnp.concatenate([early, late[::-1]]), 0, 1)  # [batch, 2C, L, ...]
  return chunks.reshape(chunks.shape[0], -1, *chunks.shape[3:])


def _all_gather_kv(state: SoftmaxState, attend_shard: Callable, own_shard: KVShard, axis: str) -> SoftmaxState:
  """One all-gather; the pairs of own chunks do not wait for it."""
  device, other = jax.lax.axis_index(axis), jnp.arange(jax.lax.axis_size(axis) - 1)
  is_after = other >= device

  def without_own(x):  # a choice of two slices: the gradient of an index would be a scatter
    return jnp.where(is_after.reshape(-1, *[1] * (x.ndim - 1)), x[1:], x[:-1])

  shards = jax.tree.map(without_own, jax.lax.all_gather(own_shard, axis))  # [C - 1, batch, 2 L, ...]
  sources = other + is_after
  return jax.lax.scan(lambda state, x: (attend_shard(state, *x), None), state, (sources, shards))[0]


def _ring_kv(state: SoftmaxState, attend_shard: Callable, own_shard: KVShard, axis: str) -> SoftmaxState:
  """C - 1 sends around a ring. Each shard is sent on before it is used, so that the two overlap."""
  device, devices = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
  ring = [(i, (i + 1) % devices) for i in range(devices)]
  send = functools.partial(jax.lax.ppermute, axis_name=axis, perm=ring)

  def hop(carry, distance):
    state, shard = carry
    next_shard = send(shard)
    return (attend_shard(state, (device - distance) % devices, shard), next_shard), None

  (state, last_shard), _ = jax.lax.scan(hop, (state, send(own_shard)), jnp.arange(1, devices - 1))
  return attend_shard(state, (device + 1) % devices, last_shard)


KV_COMM = {"gather": _all_gather_kv, "ring": _ring_kv}


def _attend_pair(
  expand_kv: ExpandKV,
  scale: float,
  window: int,
  own: bool,
  q: jax.Array,
  segment_ids: jax.Array | None,
  shard: KVShard,
  pair: jax.Array,
  distance: jax.Array | None,
) -> SoftmaxState:
  """Softmax state of one pair: max logit and denominator [batch, heads, L], numerator [batch, heads, L, value width].

  `own`: whether `shard` is this device's. `distance`: of the chunks, see `chunk_distance`; with a window only. A query that attends to no key of the pair has the lowest logit and sums that
  are finite and mean nothing: their weight is zero in `_merge`.
  """
  (query_chunk, key_chunk), length = pair, q.shape[1] // 2

  def slice_chunk(x, chunk):
    return jax.lax.dynamic_slice_in_dim(x, chunk * length, length, axis=1)

  kv, kv_segment_ids = shard
  k, v = expand_kv(jax.tree.map(lambda x: slice_chunk(x, key_chunk), kv))
  batch, _, heads, width = q.shape
  q = slice_chunk(q, query_chunk).reshape(batch, length, k.shape[2], -1, width)
  dtype = at_least_float32(q.dtype)
  # [batch, kv_heads, group, L queries, L keys]
  logits = scale * jnp.einsum("bqhgk,bshk->bhgqs", q, k, preferred_element_type=dtype)
  lowest = jnp.finfo(logits.dtype).min
  if own:
    logits = jnp.where(jnp.tril(jnp.ones((length, length), bool)) | (query_chunk > key_chunk), logits, lowest)
  if distance is not None:
    positions = jnp.arange(length)
    logits = jnp.where(distance * length + positions[:, None] - positions < window, logits, lowest)
  if segment_ids is not None:
    q_segments, k_segments = slice_chunk(segment_ids, query_chunk), slice_chunk(kv_segment_ids, key_chunk)
    logits = jnp.where((q_segments[:, :, None] == k_segments[:, None])[:, None, None], logits, lowest)
  # A constant: attention does not depend on it, so that the backward pass needs no states of earlier pairs.
  max_logit = jax.lax.stop_gradient(logits).max(-1)
  weights = jnp.exp(logits - max_logit[..., None])
  numerator = jnp.einsum("bhgqs,bshv->bhgqv", weights.astype(v.dtype), v, preferred_element_type=dtype)
  max_logit, denominator, numerator = (
    x.reshape(batch, heads, *x.shape[3:]) for x in (max_logit, weights.sum(-1), numerator)
  )
  return max_logit, denominator, numerator


def _merge(state: SoftmaxState, chunk: jax.Array | int, new: SoftmaxState) -> SoftmaxState:
  """`state`, of both query chunks on dimension 0, with the state of one more pair merged into that of `chunk`."""
  old = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, chunk, keepdims=False), state)
  max_logit = jnp.maximum(old[0], new[0])
  old_scale, new_scale = jnp.exp(old[0] - max_logit), jnp.exp(new[0] - max_logit)
  denominator = old_scale * old[1] + new_scale * new[1]
  numerator = old_scale[..., None] * old[2] + new_scale[..., None] * new[2]
  merged = max_logit, denominator, numerator
  return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, chunk, 0), state, merged)
