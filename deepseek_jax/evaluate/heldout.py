"""Loss and bits per byte on the held-out split."""

import math

import numpy as np

from deepseek_jax.distributed import to_host


def evaluate(row_nats, place, heldout, rows, sequences):
  """Mean loss over held-out windows, each counted once.

  Args:
    row_nats: placed tokens [rows, seq + 1] -> nats [rows], summed over the sequence.
    place: window ids [rows] of the held-out split -> tokens on the devices.
    heldout: the split, with `len()` and `bytes(ids)`.
    rows: sequences per forward pass.
    sequences: windows to take, evenly spaced over the split; all if there are no more.

  Returns:
    {"loss": nats per token, "bits_per_byte", "sequences"}.
  """
  count = min(sequences, len(heldout))
  ids = np.linspace(0, len(heldout), count, endpoint=False).astype(np.int64)
  nats, tokens = 0.0, 0
  for start in range(0, count, rows):
    part = ids[start : start + rows]
    padded = np.concatenate([part, np.full(rows - len(part), part[0])])
    batch = place(padded)
    nats += float(np.sum(to_host(row_nats(batch)).astype(np.float64)[: len(part)]))
    tokens += len(part) * (batch.shape[1] - 1)
  bits_per_byte = nats / math.log(2) / int(heldout.target_bytes(ids).sum())
  return {"loss": nats / tokens, "bits_per_byte": bits_per_byte, "sequences": count}
