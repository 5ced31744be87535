"""Updates that were skipped: why, what to do about it, and when a run gives up."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.training.layer_aux import skip_causes


class Diverged(RuntimeError):
  """Too many updates in a row were skipped."""


def check_skipped(
  config: Config,
  step: int,
  metrics: Mapping[str, Any],
  saved_steps: Callable[[], Sequence[int]],
  print_line: Callable[[str], None],
) -> int:
  """Prints why the update of `step` was skipped, if it was. Returns how many in a row were.

  Args:
    metrics: of the step, as `step.make_train_step` returns them, on the host.
    saved_steps: gives the steps of the checkpoints.
    print_line: prints a line of text.

  Raises:
    Diverged: `train.max_skipped` in a row were skipped. It names a checkpoint whose weights are known to be good.
  """
  in_a_row = int(metrics["skipped"]["in_a_row"])
  if not in_a_row:
    return 0
  observed = skip_causes(config, metrics)
  causes = observed or [("gradients are not finite", "lower schedule.peak or optimizer.clip")]
  reason, advice = (", and ".join(texts) for texts in zip(*causes, strict=True))
  print_line(f"step {step}: {reason}, update skipped ({in_a_row} in a row); if this persists, {advice}")
  if in_a_row >= config.train.max_skipped:
    first = step - in_a_row + 1
    raise Diverged(
      f"{in_a_row} updates in a row up to step {step} were skipped, the last one because {reason}; the first was step "
      f"{first}: {advice}, {_way_back(first, saved_steps(), weights_are_good=bool(observed))}"
    )
  return in_a_row


def _way_back(first: int, saved_steps: Sequence[int], weights_are_good: bool) -> str:
  """How to go on after updates from step `first` on were skipped: from which of `saved_steps`.

  The update of step s + 1 is computed with the weights of step s. So those of the steps from `first` - 1 on are what
  gave no finite gradients.
  """
  if weights_are_good:
    newest = max(saved_steps, default=0)
    return f"and run the same command again, which continues from step {newest}"
  good = max((step for step in saved_steps if step < first - 1), default=None)
  if good is None:
    return "and start again in another --workdir: no checkpoint is from before that"
  return f"and go back to before that: the same command with --resume_from={good}"


def heldout_nan_hint(config: Config) -> str:
  """What makes a held-out loss NaN although the model is finite, and what to do about it. Empty where nothing does."""
  return "; or ".join(f"{reason}: {advice}" for reason, advice in skip_causes(config, metrics=None))
