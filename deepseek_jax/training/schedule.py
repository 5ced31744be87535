"""Schedules: functions of steps and tokens, computed on the host and passed to each step."""

import bisect
import dataclasses
import math
from collections.abc import Callable
from typing import Self

import jax
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from deepseek_jax.config import Config
from deepseek_jax.config_sections import BalanceConfig, MTPConfig, ScheduleConfig
from deepseek_jax.model_config import ModelConfig

# Each of SCHEDULE gives the learning rate as a factor of its peak. `progress` is the fraction of the schedule that is
# done, `start` the fraction at which warm-up ends.


def constant(config: ScheduleConfig, progress: float, start: float) -> float:
  """Always 1."""
  return 1.0


def warmup_cosine(config: ScheduleConfig, progress: float, start: float) -> float:
  """Cosine from 1 at the end of warm-up (`start`) to factors[0] at the end of the schedule."""
  return cosine(progress, start, 1.0, config.factors[0])


def multi_step(config: ScheduleConfig, progress: float, start: float) -> float:
  """factors[i] from milestones[i] on (DeepSeek LLM section 2.3: 0.316 from 80%, 0.1 from 90% of the tokens)."""
  return (1.0, *config.factors)[bisect.bisect_right(config.milestones, progress)]


def wsd(config: ScheduleConfig, progress: float, start: float) -> float:
  """Warm-up, stable, decay: cosine between milestones[0] and [1] to factors[0], factors[i] from milestones[i + 1] on.

  DeepSeek-V3 section 4.2: constant to 10T tokens, cosine over 4.3T, constant for 333B, lower for 167B.
  """
  factor = bisect.bisect_right(config.milestones, progress) - 2
  if factor >= 0:
    return config.factors[factor]
  start, end = config.milestones[:2]
  return cosine(progress, start, end, config.factors[0])


def cosine(progress: float, start: float, end: float, final: float) -> float:
  """1 until `start`, half a cosine down to `final` at `end`."""
  fraction = min(max((progress - start) / max(end - start, 1e-12), 0.0), 1.0)
  return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * fraction))


SCHEDULE: dict[str, Callable[[ScheduleConfig, float, float], float]] = {
  "constant": constant,
  "warmup_cosine": warmup_cosine,
  "multi_step": multi_step,
  "wsd": wsd,
}


def learning_rate(config: ScheduleConfig, step: int, tokens: int | float, batch_tokens: int | float) -> float:
  """Learning rate of the update that follows `step` updates on `tokens` tokens, with a batch of `batch_tokens`."""
  step, tokens = max(step - config.start_step, 0), max(tokens - config.start_tokens, 0)
  if config.warmup_tokens:
    warmup = min(1.0, (tokens + batch_tokens) / config.warmup_tokens)
  else:
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
  if config.tokens:
    progress, start = tokens / config.tokens, config.warmup_tokens / config.tokens
  else:
    progress, start = step / config.steps, config.warmup_steps / config.steps
  return config.peak * warmup * SCHEDULE[config.kind](config, progress, start)


def mtp_weight(config: MTPConfig, tokens: int) -> float:
  """Weight of the multi-token prediction loss after `tokens` tokens."""
  return config.weights[bisect.bisect_right(config.tokens, tokens)]


def bias_update_rate(config: BalanceConfig, tokens: int) -> float:
  """Update rate of router biases after `tokens` tokens."""
  is_frozen = config.bias_update_tokens and tokens >= config.bias_update_tokens
  return 0.0 if is_frozen else config.bias_update_rate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
  """What each step is told by the schedules, as scalars. A new one is a field, and a line in `at`."""

  learning_rate: ArrayLike = 0.0
  mtp_weight: ArrayLike = 0.0
  bias_update_rate: ArrayLike = 0.0

  @classmethod
  def at(cls, config: Config, step: int, tokens: int, batch_tokens: int) -> Self:
    """Those of the update that follows `step` updates on `tokens` tokens, with a batch of `batch_tokens`."""
    return cls(
      learning_rate=learning_rate(config.schedule, step, tokens, batch_tokens),
      mtp_weight=mtp_weight(config.mtp, tokens),
      bias_update_rate=bias_update_rate(config.balance, tokens),
    )

  def as_arrays(self, dtype: DTypeLike) -> Self:
    """The same as arrays [] in `dtype`, the parameters'."""
    return jax.tree.map(lambda value: np.asarray(value, dtype), self)

  @classmethod
  def abstract(cls, dtype: DTypeLike, sharding: jax.sharding.Sharding | None = None) -> Self:
    """The same without values, to trace a step."""
    scalar = jax.ShapeDtypeStruct((), dtype, sharding=sharding)
    return jax.tree.map(lambda _: scalar, cls())

  def logged(self, model: ModelConfig) -> dict[str, ArrayLike]:
    """Those that say something of `model`."""
    used = {"mtp_weight": model.num_mtp_layers > 0, "bias_update_rate": model.moe.router_bias}
    return {name: value for name, value in vars(self).items() if used.get(name, True)}
