"""Whether the learning rate's schedule and the length of the run fit each other; said before anything is trained."""

import dataclasses
from collections.abc import Sequence

from deepseek_jax.checkpoint.compatibility import Difference
from deepseek_jax.config import Config
from deepseek_jax.config_sections import ScheduleConfig
from deepseek_jax.data.pipeline import batch_size
from deepseek_jax.errors import ConfigError
from deepseek_jax.plan.summary import planned_tokens
from deepseek_jax.training.schedule import SCHEDULE, learning_rate

SHORT = 0.05  # of the way from the peak to the last rate: what is left of it at the end of a run that is called short
TOKENS_TOLERANCE = 0.01  # by which the tokens of a run may differ from the schedule's: steps are whole batches


def check_warmup(config: Config) -> None:
  """Raises ConfigError where the warm-up is not shorter than the schedule. A constant schedule has no length."""
  schedule = config.schedule
  if schedule.kind == "constant":
    return
  warmup, length = schedule.warmup_steps, schedule.steps
  if schedule.warmup_tokens or schedule.tokens:
    warmup = schedule.warmup_tokens or tokens_of_schedule(config, schedule.warmup_steps)
    length = schedule.tokens or tokens_of_schedule(config, schedule.steps)
  if warmup >= length:
    warmup_field = "warmup_tokens" if schedule.warmup_tokens else "warmup_steps"
    length_field = "tokens" if schedule.tokens else "steps"
    raise ConfigError(
      f"schedule.{warmup_field}={getattr(schedule, warmup_field)} is not shorter than "
      f"schedule.{length_field}={getattr(schedule, length_field)}: the rate would never be at its peak; lower the first, "
      "or raise the second"
    )


def last_learning_rate(config: Config, step: int = 0, tokens: int = 0) -> float:
  """That of the last update of a run, which goes on from `step` updates on `tokens` tokens."""
  batch_tokens = config.train.global_batch * config.data.seq
  tokens_before = max(planned_tokens(config, step, tokens) - batch_tokens, 0)
  return learning_rate(config.schedule, config.train.steps - 1, tokens_before, batch_tokens)


def schedule_warnings(config: Config, step: int = 0, tokens: int = 0, stage: str = "") -> list[str]:
  """Lines about a run that goes on after its schedule has ended, or ends well before that.

  step, tokens: completed updates and their tokens, from which the run goes on. stage: the name of the stage, whose
  until_tokens says when the run ends; "": train.steps says it.
  """
  schedule, length_field = config.schedule, f"until_tokens of the stage {stage}" if stage else "train.steps"
  steps = config.train.steps - schedule.start_step
  run_tokens = planned_tokens(config, step, tokens)
  end_tokens = run_tokens - schedule.start_tokens
  end_rate = last_learning_rate(config, step, tokens)
  if schedule.warmup_tokens > end_tokens or (not schedule.warmup_tokens and schedule.warmup_steps > steps):
    return [
      f"train.steps={config.train.steps} ends within the warm-up, at a learning rate of {end_rate:.3g} on the way to {schedule.peak:.3g}; "
      f"raise {length_field}, or shorten the warm-up of the schedule"
    ]
  if schedule.kind == "constant":
    return []
  unit, length, end = ("tokens", schedule.tokens, end_tokens) if schedule.tokens else ("steps", schedule.steps, steps)
  last_rate = schedule.peak * SCHEDULE[schedule.kind](schedule, 1.0, 0.0)
  tolerance = TOKENS_TOLERANCE * schedule.tokens
  if end > length + tolerance:
    return [
      f"schedule.{unit}={length} ends before the run, at {end} {unit}: from there on every step has the last learning "
      f"rate, {last_rate:.3g}; {_fit(config, run_tokens, length_field)}"
    ]
  if end < length - tolerance and end_rate > last_rate + SHORT * (schedule.peak - last_rate):
    return [
      f"the run ends at {end / length:.0%} of schedule.{unit}={length}, at a learning rate of {end_rate:.3g}, where the "
      f"schedule ends at {last_rate:.3g}; {_fit(config, run_tokens, length_field)}"
    ]
  return []


def changed_rate_warning(config: Config, changes: Sequence[Difference], step: int, tokens: int) -> list[str]:
  """A line where the next step of a resumed run has another learning rate than by the checkpoint's schedule.

  changes: as `check_compatible` returns them. step, tokens: completed updates, and their tokens.
  """
  fields = {f"schedule.{field.name}" for field in dataclasses.fields(ScheduleConfig)}
  saved = {path.removeprefix("schedule."): old for path, old, _ in changes if path in fields}
  if not saved or not step:
    return []
  batch_tokens = batch_size(config.train, tokens) * config.data.seq
  schedules = (dataclasses.replace(config.schedule, **saved), config.schedule)
  before, now = (learning_rate(schedule, step, tokens, batch_tokens) for schedule in schedules)
  if abs(now - before) <= 0.01 * before:
    return []
  return [
    f"the schedule has changed: step {step + 1} has a learning rate of {now:.3g}, by the checkpoint's it was {before:.3g}"
  ]


def fitted_fields(config: Config, end_tokens: int) -> dict[str, int]:
  """The fields of the schedule with which it ends with the run, at `end_tokens` of it. None for a constant schedule."""
  schedule = config.schedule
  if schedule.kind == "constant":
    return {}
  if schedule.tokens:
    return {"schedule.tokens": end_tokens - schedule.start_tokens}
  return {"schedule.steps": config.train.steps - schedule.start_step}


def tokens_of_schedule(config: Config, steps: int) -> int:
  """Tokens of the first `steps` updates of the schedule."""
  start_step, start_tokens = config.schedule.start_step, config.schedule.start_tokens
  if not steps:
    return 0
  to_there = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=start_step + steps))
  return planned_tokens(to_there, start_step, start_tokens) - start_tokens


def _fit(config: Config, end_tokens: int, length_field: str) -> str:
  """What to do."""
  fields = fitted_fields(config, end_tokens)
  stretch = f", or set {' and '.join(f'{path}={value}' for path, value in fields.items())}" if fields else ""
  return f"change {length_field}{stretch}"
