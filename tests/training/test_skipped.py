"""What a skipped update prints, and when a run gives up."""

import dataclasses

import pytest

from deepseek_jax.config import Config, TrainConfig
from deepseek_jax.training.skipped import Diverged, check_skipped

CONFIG = dataclasses.replace(Config(), train=TrainConfig(max_skipped=2))


@pytest.mark.parametrize(
  ("overflow", "reason", "advice"),
  [(0, "gradients are not finite", "schedule.peak"), (1234, "1,234 assignments overflowed", "model.moe.buffer_factor")],
)
def test_the_reason_is_printed_and_too_many_in_a_row_diverge(overflow, reason, advice):
  lines = []
  check_skipped(CONFIG, 7, 1, overflow, 5, lines.append)
  assert len(lines) == 1 and reason in lines[0] and advice in lines[0] and "step 7" in lines[0]
  with pytest.raises(Diverged, match=r"2 updates in a row up to step 8 .* checkpoint is of step 5"):
    check_skipped(CONFIG, 8, 2, overflow, 5, lines.append)
