"""Causal attention of a training step: softmax(scale q k^T) v, each query with the keys of its segment that are not after it."""

from deepseek_jax.kernels.implementations import run


def attention(q, k, v, *, scale, segment_ids=None, implementation="auto"):
  """[batch, seq, heads, value width] in the dtype of `v`; logits and softmax in at least float32.

  Args:
    q: [batch, seq, heads, key width]. k: [batch, seq, kv_heads, key width]. v: [batch, seq, kv_heads, value width].
    scale: factor of the logits.
    segment_ids: [batch, seq] int; positions attend within their segment only, a run of equal numbers.
    implementation: as in `implementations.run`; "pallas_tpu" is jax's splash attention, "pallas_gpu" that of tokamax, if it
      is installed; neither holds scores in memory.

  Raises:
    ValueError: an `implementation` that does not exist, or does not do this.
  """
  return run("attention", "attention", implementation, q, k, v, segment_ids, scale)


def attention_of_part(q, k, v, positions, part, *, scale, segment_ids=None, implementation="auto"):
  """As `attention`, of queries [batch, queries, ..] that are those at `positions[part]` of the sequence of all keys.

  Args:
    positions: [parts, queries] int32 of NumPy, of each part: each position of the sequence once.
    part: int, which may be traced.
    segment_ids: (of the queries [batch, queries], of the keys [batch, seq]).
  """
  return run("attention", "attention_of_part", implementation, q, k, v, segment_ids, scale, positions, part)
