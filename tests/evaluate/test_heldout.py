"""Every held-out window counts once, padding not at all."""

import math

import numpy as np
import pytest

from deepseek_jax.evaluate.heldout import evaluate


class Split:
  """Windows whose id is in their tokens; window i stands for i + 1 bytes."""

  def __len__(self):
    return 11

  def target_bytes(self, ids):
    return np.asarray(ids) + 1


@pytest.mark.parametrize("batch_size", [1, 4, 11, 16])
@pytest.mark.parametrize("sequences", [3, 11, 99])
def test_each_window_counts_once(batch_size, sequences):
  seen, loss_of = [], lambda ids: 2.0 * ids + 1

  def load_tokens(ids):
    assert len(ids) == batch_size
    return np.repeat(ids[:, None], 6, 1)

  def eval_step(tokens):
    seen.append(tokens[:, 0])
    return loss_of(tokens[:, 0])

  result = evaluate(eval_step, load_tokens, Split(), batch_size, sequences)
  count = min(sequences, 11)
  ids = np.concatenate(seen)[:count]
  assert len(set(ids)) == count == result["sequences"]
  assert result["loss"] == pytest.approx(loss_of(ids).sum() / (5 * count))
  assert result["bits_per_byte"] == pytest.approx(loss_of(ids).sum() / math.log(2) / (ids + 1).sum())
