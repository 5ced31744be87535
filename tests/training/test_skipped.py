"""What a skipped update prints, and when a run gives up."""

import dataclasses

import numpy as np
import pytest

from deepseek_jax.config import Config
from deepseek_jax.config_sections import TrainConfig
from deepseek_jax.training import layer_aux
from deepseek_jax.training.layer_aux import LayerAux, Observation
from deepseek_jax.training.skipped import Diverged, check_skipped, heldout_nan_hint
from tests.configs import DENSE, with_model, with_moe

CONFIG = dataclasses.replace(Config(), train=TrainConfig(max_skipped=2))
SMALL_BUFFERS = with_model(CONFIG, moe=with_moe(DENSE, buffer_factor=1.5).moe)
FAULTS = Observation(skip_cause=lambda config, faults: (f"{faults} indexers of {config.name} failed", "reset them"))


def metrics(in_a_row, **observed):
  return {"skipped": {"total": np.int32(9), "in_a_row": np.int32(in_a_row)}} | {
    name: np.int32(value) for name, value in observed.items()
  }


@pytest.fixture
def faults(monkeypatch):
  """One more row, whose observation skips updates."""
  monkeypatch.setitem(
    layer_aux.LAYER_AUX, "indexer", LayerAux(lambda value, config: {"faults": value}, {"faults": FAULTS})
  )


@pytest.mark.parametrize(
  ("observed", "reason", "advice"),
  [
    ({}, "gradients are not finite", "lower schedule.peak"),
    (dict(overflow=0, faults=0), "gradients are not finite", "lower schedule.peak"),
    (
      dict(overflow=1234, faults=0),
      "1,234 assignments overflowed the expert buffers of 1.5 times an even load",
      "raise model.moe.buffer_factor above 1.5 (0: worst-case size, never overflows)",
    ),
    (dict(overflow=0, faults=3), f"3 indexers of {CONFIG.name} failed", "reset them"),
    (
      dict(overflow=2, faults=3),
      f"2 assignments overflowed the expert buffers of 1.5 times an even load, and 3 indexers of {CONFIG.name} failed",
      "raise model.moe.buffer_factor above 1.5 (0: worst-case size, never overflows), and reset them",
    ),
  ],
)
def test_the_reason_is_printed_and_too_many_in_a_row_diverge(faults, observed, reason, advice):
  lines = []
  check_skipped(SMALL_BUFFERS, 6, metrics(0, **observed), 5, lines.append)
  assert lines == []
  check_skipped(SMALL_BUFFERS, 7, metrics(1, **observed), 5, lines.append)
  assert lines == [f"step 7: {reason}, update skipped (1 in a row); if this persists, {advice}"]
  with pytest.raises(Diverged) as error:
    check_skipped(SMALL_BUFFERS, 8, metrics(2, **observed), 5, lines.append)
  assert str(error.value) == (
    f"2 updates in a row up to step 8 were skipped, the last one because {reason}; the newest checkpoint is of step 5: "
    f"{advice}, or raise train.max_skipped"
  )


def test_a_held_out_loss_that_is_nan_may_have_the_causes_of_the_config(monkeypatch):
  assert heldout_nan_hint(CONFIG) == ""
  overflow = (
    "assignments overflowed the expert buffers of 1.5 times an even load: raise model.moe.buffer_factor above 1.5 "
    "(0: worst-case size, never overflows)"
  )
  assert heldout_nan_hint(SMALL_BUFFERS) == overflow
  row = LayerAux(None, {"faults": Observation(skip_cause=lambda config, faults: ("an indexer failed", "reset it"))})
  monkeypatch.setitem(layer_aux.LAYER_AUX, "indexer", row)
  assert heldout_nan_hint(CONFIG) == "an indexer failed: reset it"
  assert heldout_nan_hint(SMALL_BUFFERS) == f"{overflow}; or an indexer failed: reset it"
