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
  window_ids = evenly_spaced(len(heldout), sequences)
  losses, targets = window_losses(eval_step, load_tokens, window_ids, batch_size)
  return {
    "loss": float(losses.sum()) / targets,
    "bits_per_byte": float(losses.sum()) / math.log(2) / int(heldout.target_bytes(window_ids).sum()),
    "sequences": len(window_ids),
  }


def evenly_spaced(windows: int, sequences: int) -> np.ndarray:
  """int64 [n]: ids of at most `sequences` of `windows`, evenly spaced."""
  return np.linspace(0, windows, min(sequences, windows), endpoint=False).astype(np.int64)


def window_losses(
  eval_step: Callable[[jax.Array], jax.Array],
  load_tokens: Callable[[np.ndarray], jax.Array],
  window_ids: np.ndarray,
  batch_size: int,
  update: Callable[[int], None] = lambda done: None,
) -> tuple[np.ndarray, int]:
  """(cross entropy float64 [n] in nats, summed over each window; targets of all windows) of `window_ids` [n].

  The last batch is padded with copies of its first window, which do not count. update: is called with the number of
  windows that are done. Other arguments as in `evaluate`.
  """
  losses, targets = np.empty(len(window_ids)), 0
  for start in range(0, len(window_ids), batch_size):
    ids = window_ids[start : start + batch_size]
    padded_ids = np.concatenate([ids, np.full(batch_size - len(ids), ids[0])])
    batch = load_tokens(padded_ids)
    losses[start : start + len(ids)] = gather_to_host(eval_step(batch))[: len(ids)]
    targets += len(ids) * (batch.shape[1] - 1)
    update(start + len(ids))
  return losses, targets
