"""Updates that were skipped: why, what to do about it, and when a run gives up."""

from collections.abc import Callable, Mapping
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.training.layer_aux import skip_causes


class Diverged(RuntimeError):
  """Too many updates in a row were skipped."""


def check_skipped(
  config: Config, step: int, metrics: Mapping[str, Any], saved_step: int, print_line: Callable[[str], None]
) -> None:
  """Prints why the update of `step` was skipped, if it was. Raises Diverged where `train.max_skipped` in a row were.

  Args:
    metrics: of the step, as `step.make_train_step` returns them, on the host.
    saved_step: of the newest checkpoint.
    print_line: prints a line of text.
  """
  in_a_row = int(metrics["skipped"]["in_a_row"])
  if not in_a_row:
    return
  causes = skip_causes(config, metrics) or [("gradients are not finite", "lower schedule.peak")]
  reason, advice = (", and ".join(texts) for texts in zip(*causes, strict=True))
  print_line(f"step {step}: {reason}, update skipped ({in_a_row} in a row); if this persists, {advice}")
  if in_a_row >= config.train.max_skipped:
    raise Diverged(
      f"{in_a_row} updates in a row up to step {step} were skipped, the last one because {reason}; "
      f"the newest checkpoint is of step {saved_step}: {advice}, or raise train.max_skipped"
    )


def heldout_nan_hint(config: Config) -> str:
  """What makes a held-out loss NaN although the model is finite, and what to do about it. Empty where nothing does."""
  return "; or ".join(f"{reason}: {advice}" for reason, advice in skip_causes(config, metrics=None))
