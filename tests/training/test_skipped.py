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


NOT_FINITE = "gradients are not finite", "lower schedule.peak or optimizer.clip"
OVERFLOW_ADVICE = "raise model.moe.buffer_factor above 1.5 (0: worst-case size, never overflows)"


@pytest.mark.parametrize(
  ("observed", "reason", "advice"),
  [
    ({}, *NOT_FINITE),
    (dict(overflow=0, faults=0), *NOT_FINITE),
    (
      dict(overflow=1234, faults=0),
      "1,234 assignments overflowed the expert buffers of 1.5 times an even load",
      OVERFLOW_ADVICE,
    ),
    (dict(overflow=0, faults=3), f"3 indexers of {CONFIG.name} failed", "reset them"),
    (
      dict(overflow=2, faults=3),
      f"2 assignments overflowed the expert buffers of 1.5 times an even load, and 3 indexers of {CONFIG.name} failed",
      f"{OVERFLOW_ADVICE}, and reset them",
    ),
  ],
)
def test_the_reason_is_printed_and_too_many_in_a_row_diverge(faults, observed, reason, advice):
  lines = []
  assert check_skipped(SMALL_BUFFERS, 6, metrics(0, **observed), lambda: [5], lines.append) == 0
  assert lines == []
  assert check_skipped(SMALL_BUFFERS, 7, metrics(1, **observed), lambda: [5], lines.append) == 1
  assert lines == [f"step 7: {reason}, update skipped (1 in a row); if this persists, {advice}"]
  with pytest.raises(Diverged) as error:
    check_skipped(SMALL_BUFFERS, 8, metrics(2, **observed), lambda: [3, 5], lines.append)
  way_back = "run the same command again, which continues from step 5"
  if advice == NOT_FINITE[1]:
    way_back = "go back to before that: the same command with --resume_from=5"
  assert str(error.value) == (
    f"2 updates in a row up to step 8 were skipped, the last one because {reason}; the first was step 7: {advice}, "
    f"and {way_back}"
  )


@pytest.mark.parametrize(
  ("steps", "end"),
  [
    ([2, 5, 6, 7], "--resume_from=5"),  # the update of step 7, the first one skipped, is of the weights of step 6
    ([6, 8], "start again in another --workdir: no checkpoint is from before that"),
    ([], "no checkpoint is from before that"),
  ],
)
def test_a_run_that_diverged_names_a_checkpoint_with_weights_that_gave_finite_gradients(steps, end):
  with pytest.raises(Diverged) as error:
    check_skipped(CONFIG, 8, metrics(2), lambda: steps, lambda line: None)
  assert str(error.value).endswith(end)


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
