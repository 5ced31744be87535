"""Updates that were skipped: why, what to do about it, and when a run gives up."""

from collections.abc import Callable

from deepseek_jax.config import Config


class Diverged(RuntimeError):
  """Too many updates in a row were skipped."""


def check_skipped(
  config: Config, step: int, in_a_row: int, overflow: int, saved_step: int, print_line: Callable[[str], None]
) -> None:
  """Prints why the update of `step` was skipped. Raises Diverged when `train.max_skipped` in a row were.

  Args:
    in_a_row: skipped updates up to this one.
    overflow: assignments that overflowed the expert buffers, and rows that did on their way there, in all microbatches.
    saved_step: of the newest checkpoint.
    print_line: prints a line of text.
  """
  if overflow:
    factor = config.model.moe.buffer_factor
    reason = f"{overflow:,} assignments overflowed the expert buffers of {factor:g} times an even load"
    advice = f"raise model.moe.buffer_factor above {factor:g} (0: worst-case size, never overflows)"
  else:
    reason, advice = "gradients are not finite", "lower schedule.peak"
  print_line(f"step {step}: {reason}, update skipped ({in_a_row} in a row); if this persists, {advice}")
  if in_a_row >= config.train.max_skipped:
    raise Diverged(
      f"{in_a_row} updates in a row up to step {step} were skipped, the last one because {reason}; "
      f"the newest checkpoint is of step {saved_step}: {advice}, or raise train.max_skipped"
    )
