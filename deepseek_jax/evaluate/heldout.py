"""Loss and bits per byte on the held-out split."""

import math
from collections.abc import Callable

import jax
import numpy as np

from deepseek_jax.data.pipeline import ConcatSplit
from deepseek_jax.distributed import gather_to_host


def evaluate(
  eval_step: Callable[[jax.Array], jax.Array],
  load_tokens: Callable[[np.ndarray], jax.Array],
  heldout: ConcatSplit,
  batch_size: int,
  sequences: int,
) -> dict[str, float | int]:
  """Mean loss over held-out windows, each counted once.

  Args:
    eval_step: tokens [batch_size, seq + 1] -> cross entropy [batch_size] in nats, summed over each sequence.
    load_tokens: window ids [batch_size] of the held-out split -> their tokens, on the devices.
    heldout: the held-out split.
    batch_size: sequences per forward pass.
    sequences: windows to evaluate, evenly spaced over the split; all of them if the split has no more.

  Returns:
    {"loss": mean cross entropy in nats per token, "bits_per_byte", "sequences"}.
  """
  count = min(sequences, len(heldout))
  window_ids = np.linspace(0, len(heldout), count, endpoint=False).astype(np.int64)
  loss_sum, tokens = 0.0, 0
  for start in range(0, count, batch_size):
    ids = window_ids[start : start + batch_size]
    padded_ids = np.concatenate([ids, np.full(batch_size - len(ids), ids[0])])
    batch = load_tokens(padded_ids)
    losses = gather_to_host(eval_step(batch)).astype(np.float64)
    loss_sum += float(np.sum(losses[: len(ids)]))
    tokens += len(ids) * (batch.shape[1] - 1)
  bits_per_byte = loss_sum / math.log(2) / int(heldout.target_bytes(window_ids).sum())
  return {"loss": loss_sum / tokens, "bits_per_byte": bits_per_byte, "sequences": count}
