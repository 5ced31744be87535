"""Causal attention to a sequence that C devices share: only the causal half of the work, and as much of it for each.

The sequence is cut into 2C chunks of L positions; device c holds chunk c and chunk 2C-1-c, its early and its late one
(Llama 3, arXiv 2407.21783, section 3.3.2). Then each device has 2C+1 pairs of a query and a key chunk to do, of the
(2C)^2 that there are: 3 of its own chunks, 2 with those of each other device. Results of pairs are added up as in an
online softmax.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.kernels.attention.api import attention_of_part
from deepseek_jax.model.linear import at_least_float32

EARLY, LATE = 0, 1
OWN_PAIRS = ((EARLY, EARLY), (LATE, LATE), (LATE, EARLY))


def zigzag(seq, parts):
  """Positions that each of `parts` devices holds: int32 [parts, seq / parts].

  Raises:
    ValueError: `seq` has no 2 * parts equal chunks (one part may have any length).
  """
  if parts == 1:
    return np.arange(seq, dtype=np.int32)[None]
  if seq % (2 * parts):
    raise ValueError(f"a sequence of {seq} positions over {parts} devices: it must be divisible by {2 * parts}")
  chunks = np.arange(seq, dtype=np.int32).reshape(2 * parts, -1)
  return np.concatenate([chunks[:parts], chunks[: parts - 1 : -1]], 1)


def chunk_pairs(source, device):
  """(query chunk, key chunk) of the two pairs that `device` does with the keys of another device, `source`.

  Late queries see every early key. A later device has a later early chunk and an earlier late one, so of the pairs of
  like chunks one is seen whole and one not at all. The devices may be traced: two pairs either way.
  """
  like = (source > device) * LATE
  return (LATE, EARLY), (like, like)


def context_parallel_attention(q, keys, expand, *, scale, axis, kind, segment_ids=None):
  """As `attend` to the whole sequence, inside a shard_map of all axes; each device holds the positions of `zigzag`.

  Backward, the scores of each pair are made again from `q` and `keys`, and each device's terms for `keys` go back to
  where they came from in the dtype of `keys`. Until then each device keeps the keys of all, which are small in MLA.

  Args:
    q: [batch, seq / C, heads, key width].
    keys: tree of arrays [batch, seq / C, ...], which travel.
    expand: of `keys` of n positions makes keys and values, [batch, n, kv_heads, key width] and [.., value width]. It
      runs 2C+1 times, for n = seq / 2C, and again backward: gather its weights before, not in it.
    scale: factor of the logits.
    axis: mesh axis that shares the sequence, of C > 1 devices.
    kind: of KV_COMM: how keys and values are exchanged.
    segment_ids: [batch, seq / C] int; positions attend within their segment only.

  Returns:
    [batch, seq / C, heads, value width] in the dtype of `q`, which keys and values share.
  """
  device, held = jax.lax.axis_index(axis), (keys, segment_ids)

  def pair(held, chunks, own):
    # The choice of chunks is inside: what is kept for the backward pass is one `q` and one `held`, no copy a pair.
    return jax.checkpoint(functools.partial(_pair, expand, scale, own), prevent_cse=False)(q, segment_ids, held, chunks)

  # Loops, for the scores of one pair at a time. The first two of these results are the sums of both chunks.
  first = jax.lax.map(lambda chunks: pair(held, chunks, own=True), jnp.array(OWN_PAIRS))
  sums = _added(jax.tree.map(lambda x: x[:2], first), LATE, jax.tree.map(lambda x: x[2], first))

  def visit(sums, source, held):
    def add(sums, chunks):
      return _added(sums, chunks[0], pair(held, chunks, own=False)), None

    return jax.lax.scan(add, sums, jnp.array(chunk_pairs(source, device)))[0]

  _, total, weighted = KV_COMM[kind](sums, visit, held, axis)
  y = weighted / total[..., None]  # [2, batch, heads, L, value width]
  y = y.transpose(1, 0, 3, 2, 4).reshape(*q.shape[:3], -1)  # [batch, 2 L, heads, value width]
  # The barrier: libtpu 0.0.50 ends in a failed check where it joins this transposition with the product that follows.
  return jax.lax.optimization_barrier(y.astype(q.dtype))


def all_gather_kv_attention(q, keys, expand, *, scale, axis, segment_ids=None, implementation="auto"):
  """As `context_parallel_attention`, with all keys and values of the sequence in memory, for a kernel that passes over those not seen."""
  whole = lambda x: _in_order(jax.lax.all_gather(x, axis))
  segments = None if segment_ids is None else (segment_ids, whole(segment_ids))
  k, v = expand(jax.tree.map(whole, keys))
  parts, part = zigzag(k.shape[1], jax.lax.axis_size(axis)), jax.lax.axis_index(axis)
  return attention_of_part(q, k, v, parts, part, scale=scale, segment_ids=segments, implementation=implementation)


def _in_order(gathered):
  """[batch, seq, ..] of what the devices hold, [C, batch, seq / C, ..]."""
  early, late = jnp.split(gathered, 2, 2)
  chunks = jnp.moveaxis(jnp.concatenate([early, late[::-1]]), 0, 1)  # [batch, 2C, L, ..]
  return chunks.reshape(chunks.shape[0], -1, *chunks.shape[3:])


def _gather(sums, visit, held, axis):
  """All keys come at once; the pairs of own chunks do not wait for them."""
  device, other = jax.lax.axis_index(axis), jnp.arange(jax.lax.axis_size(axis) - 1)
  passed = other >= device

  def others(x):  # without the device's own; a choice of two slices, where an index would be a scatter backward
    return jnp.where(passed.reshape(-1, *[1] * (x.ndim - 1)), x[1:], x[:-1])

  gathered = jax.tree.map(others, jax.lax.all_gather(held, axis))  # [C - 1, batch, 2 L, ...]
  return jax.lax.scan(lambda sums, x: (visit(sums, *x), None), sums, (other + passed, gathered))[0]


def _ring(sums, visit, held, axis):
  """Keys go from device to device, C - 1 times: they are sent on before they are worked with."""
  device, parts = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
  send = functools.partial(jax.lax.ppermute, axis_name=axis, perm=[(i, (i + 1) % parts) for i in range(parts)])

  def hop(carry, number):
    sums, held = carry
    arriving = send(held)
    return (visit(sums, (device - number) % parts, held), arriving), None

  (sums, last), _ = jax.lax.scan(hop, (sums, send(held)), jnp.arange(1, parts - 1))
  return visit(sums, (device + 1) % parts, last)


KV_COMM = {"gather": _gather, "ring": _ring}


def _pair(expand, scale, own, q, segment_ids, held, chunks):
  """Of each query its greatest logit and sum of weights [batch, heads, L], and weighted values [.., value width].

  `held` is (keys, their segment_ids) of one device; `own` says that it is this one. A query that sees no key of the
  pair has finite sums of no meaning and the lowest logit: they vanish in `_added`.
  """
  (query_chunk, key_chunk), length = chunks, q.shape[1] // 2
  part = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=length, axis=1)
  k, v = expand(jax.tree.map(lambda x: part(x, key_chunk * length), held[0]))
  batch, _, heads, width = q.shape
  q = part(q, query_chunk * length).reshape(batch, length, k.shape[2], -1, width)
  accumulated = at_least_float32(q.dtype)
  # [batch, kv_heads, group, L queries, L keys]
  logits = scale * jnp.einsum("bqhgk,bshk->bhgqs", q, k, preferred_element_type=accumulated)
  lowest = jnp.finfo(logits.dtype).min
  if own:
    logits = jnp.where(jnp.tril(jnp.ones((length, length), bool)) | (query_chunk > key_chunk), logits, lowest)
  if segment_ids is not None:
    of_queries, of_keys = part(segment_ids, query_chunk * length), part(held[1], key_chunk * length)
    logits = jnp.where((of_queries[:, :, None] == of_keys[:, None])[:, None, None], logits, lowest)
  # A constant: the attention does not depend on it, and so the backward pass needs no sums of earlier pairs.
  top = jax.lax.stop_gradient(logits).max(-1)
  weights = jnp.exp(logits - top[..., None])
  weighted = jnp.einsum("bhgqs,bshv->bhgqv", weights.astype(v.dtype), v, preferred_element_type=accumulated)
  return tuple(x.reshape(batch, heads, *x.shape[3:]) for x in (top, weights.sum(-1), weighted))


def _added(sums, chunk, new):
  """`sums`, of both query chunks (on dimension 0), with those of one more pair for `chunk`."""
  old_top, *old = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, chunk, keepdims=False), sums)
  top = jnp.maximum(old_top, new[0])
  before, after = jnp.exp(old_top - top), jnp.exp(new[0] - top)
  total = before * old[0] + after * new[1]
  weighted = before[..., None] * old[1] + after[..., None] * new[2]
  return tuple(
    jax.lax.dynamic_update_index_in_dim(x, y, chunk, 0) for x, y in zip(sums, (top, total, weighted), strict=True)
  )
