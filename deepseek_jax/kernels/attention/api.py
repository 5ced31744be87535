"""Causal attention of a training step: softmax(scale q k^T) v.

A query sees the keys of its segment up to itself; with a sliding window of w, the last w of them.
"""

from collections.abc import Callable

import jax
import numpy as np

from deepseek_jax.kernels.implementations import call_kernel


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  scale: float,
  segment_ids: jax.Array | None = None,
  window: int = 0,
  implementation: str = "auto",
) -> jax.Array:
  """[batch, seq, heads, value width] in the dtype of `v`; logits and softmax in at least float32.

  Args:
    q: [batch, seq, heads, key width]. k: [batch, seq, kv_heads, key width]. v: [batch, seq, kv_heads, value width].
    scale: factor of the logits.
    segment_ids: [batch, seq] int; positions attend within their segment only, a run of equal numbers.
    window: keys that a query sees, itself included; 0: all up to itself.
    implementation: as in `call_kernel`; "pallas_tpu" is jax's splash attention, "pallas_gpu" that of tokamax, if it is
      installed; neither holds scores in memory.

  Raises:
    ValueError: an `implementation` that does not exist, or does not support this.
  """
  return call_kernel("attention", "attention", implementation, q, k, v, segment_ids, scale, window)


def attention_of_part(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  positions: np.ndarray,
  shard: int | jax.Array,
  *,
  scale: float,
  segment_ids: tuple[jax.Array, jax.Array] | None = None,
  window: int = 0,
  implementation: str = "auto",
  fallback: Callable[[], jax.Array] | None = None,
) -> jax.Array:
  """`attention` of one context-parallel shard: of queries at `positions[shard]` of a sequence, to all of its keys.

  Args:
    q: [batch, queries, heads, key width]. k and v as in `attention`, of the whole sequence.
    positions: [shards, queries] int32 of NumPy, which hold each position of the sequence once.
    shard: which row of `positions`; it may be traced.
    segment_ids: (of the queries [batch, queries], of the keys [batch, seq]).
    window: as in `attention`.
    fallback: as in `call_kernel`.

  Raises:
    ValueError: as `attention`.
  """
  arguments = q, k, v, segment_ids, scale, window, positions, shard
  return call_kernel("attention", "attention_of_part", implementation, *arguments, fallback=fallback)


def count_visible_pairs(seq: int, window: int) -> int:
  """Pairs of a query and a key that it sees, in a sequence of one segment. `window`: as in `attention`."""
  window = min(window or seq, seq)
  return window * (window + 1) // 2 + (seq - window) * window
