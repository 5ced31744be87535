"""Stages of training: from the `stages` of a config to the config, the first and the last update of each."""

import dataclasses
from collections.abc import Mapping, Sequence

from deepseek_jax.config import Config
from deepseek_jax.data.pipeline import Consumed, Data, Share, batch_size, open_data
from deepseek_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage of a run. A run without `stages` is one stage.

  Attributes:
    config: the run's, with the fields that differ in the stage; its train.steps is the update at which the stage ends.
    name: empty for a run without stages.
    first_step: completed updates of the run when it starts.
    first, last: what is consumed when it starts and when it ends, also where train.steps ends the run before.
    reset_optimizer: whether it starts with a new optimizer state.
    is_last: whether the run ends with it.
  """

  config: Config
  name: str = ""
  first_step: int = 0
  first: Consumed = Consumed()
  last: Consumed = Consumed()
  reset_optimizer: bool = False
  is_last: bool = True


def resolve_stages(config: Config) -> tuple[Stage, ...]:
  """The stages of a run of `config`, in order; what each consumes follows from the config alone.

  A stage ends with the update that reaches its `until_tokens`. The run ends at the latest with update train.steps, if that
  is not 0: later stages are left out, and those before `first_stage`, which were trained elsewhere. A stage that sets
  fields of `schedule` starts that schedule.

  Raises ConfigError where an update of the stage before reaches beyond the end of a stage, and where none is left.
  """
  if not config.stages:
    return (Stage(config, last=advance(config, 0, Consumed(), steps=config.train.steps)[1]),)
  stages: list[Stage] = []
  step, first = 0, Consumed()
  for index, stage in enumerate(config.stages):
    starts = {"schedule.start_step": step, "schedule.start_tokens": first.tokens} if stage.schedule else {}
    at_stage = config.at_stage(index, starts)
    if config.train.steps and step >= config.train.steps:
      break
    last_step, last = advance(at_stage, step, first, stage.until_tokens)
    if last_step == step:
      raise ConfigError(
        f"stages[{index}] ({stage.name}): the last update of the stage before ends at {first.tokens:,} tokens, and "
        f"until_tokens={stage.until_tokens:,} is not above: raise it"
      )
    steps = min(last_step, config.train.steps or last_step)
    at_stage = dataclasses.replace(at_stage, train=dataclasses.replace(at_stage.train, steps=steps))
    stages.append(Stage(at_stage, stage.name, step, first, last, stage.reset_optimizer, is_last=False))
    step, first = last_step, last
  names = [stage.name for stage in stages]
  if config.first_stage and config.first_stage not in names:
    raise ConfigError(
      f"train.steps={config.train.steps} ends before the stage {config.first_stage}: raise it, or set it to 0"
    )
  stages[-1] = dataclasses.replace(stages[-1], is_last=True)
  return tuple(stages[names.index(config.first_stage) if config.first_stage else 0 :])


def advance(
  config: Config, step: int, consumed: Consumed, until_tokens: int | None = None, steps: int = 0
) -> tuple[int, Consumed]:
  """(completed updates, what they consumed) once `until_tokens` are reached, from `step` and `consumed` on.

  until_tokens: None: once `steps` updates are completed.
  """
  train, seq = config.train, config.data.seq
  samples, tokens = consumed

  def is_reached() -> bool:
    return step >= steps if until_tokens is None else tokens >= until_tokens

  while tokens < train.batch_ramp_tokens and not is_reached():
    batch = batch_size(train, tokens)
    step, samples, tokens = step + 1, samples + batch, tokens + batch * seq
  if not is_reached():
    to_go = steps - step if until_tokens is None else -(-(until_tokens - tokens) // (train.global_batch * seq))
    samples += to_go * train.global_batch
    step, tokens = step + to_go, tokens + to_go * train.global_batch * seq
  return step, Consumed(samples, tokens)


def find_stage(stages: tuple[Stage, ...], name: str) -> Stage:
  """The stage called `name`. Raises ConfigError where there is none, or where there are several and no name."""
  names = ", ".join(stage.name for stage in stages if stage.name)
  if not name and len(stages) == 1:
    return stages[0]
  if not name:
    raise ConfigError(f"the config has the stages {names}: choose one with --stage=NAME")
  for stage in stages:
    if stage.name == name:
      return stage
  raise ConfigError(f"--stage={name}: the config has {f'the stages {names}' if names else 'no stages'}")


def stage_after(stages: Sequence[Stage], tokens: int) -> int:
  """Index of the stage that goes on after `tokens` consumed ones; the last one where all have ended."""
  return next((index for index, stage in enumerate(stages) if tokens < stage.last.tokens), len(stages) - 1)


def stage_before(stages: Sequence[Stage], tokens: int) -> int:
  """Index of the stage that consumed the last of `tokens`."""
  return next((index for index, stage in enumerate(stages) if tokens <= stage.last.tokens), len(stages) - 1)


def open_stage_data(config: Config, stages: Sequence[Stage]) -> list[Data]:
  """The Data of each of `stages`, those of a run of `config`, packed at each length before the first of them trains.

  Raises what `open_data` raises.
  """
  if not config.stages:
    return [open_data(config.data, config.model.vocab, config.seed)]
  taken: Mapping[str, int] = {}
  opened = []
  for stage in stages:
    share = Share(stage.first.samples, stage.last.samples - stage.first.samples, taken)
    opened.append(open_data(stage.config.data, config.model.vocab, config.seed, share))
    taken = opened[-1].taken
  return opened
