"""Published laws that a sweep starts from: batch size and learning rate, and the allocation of compute."""

import dataclasses
from typing import Protocol

from deepseek_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class PowerLaw:
  """y = coefficient * x ** exponent."""

  coefficient: float
  exponent: float

  def __call__(self, x: float) -> float:
    return self.coefficient * x**self.exponent


@dataclasses.dataclass(frozen=True)
class TrainingRun:
  """What a hyper-parameter law may depend on: compute in FLOPs, non-embedding parameters, and tokens."""

  flops: float
  params: float
  tokens: float


class HyperparamLaw(Protocol):
  """Batch size and learning rate of a run."""

  @property
  def name(self) -> str:
    """For plans."""

  def lr(self, run: TrainingRun) -> float:
    """The peak learning rate."""

  def batch_tokens(self, run: TrainingRun) -> float:
    """Tokens of a batch."""


@dataclasses.dataclass(frozen=True)
class ComputeLaw:
  """Both are power laws of the compute (DeepSeek LLM, arXiv 2401.02954, eq. 1)."""

  name: str
  lr_law: PowerLaw
  batch_law: PowerLaw

  def lr(self, run: TrainingRun) -> float:
    """The peak learning rate."""
    return self.lr_law(run.flops)

  def batch_tokens(self, run: TrainingRun) -> float:
    """Tokens of a batch."""
    return self.batch_law(run.flops)


@dataclasses.dataclass(frozen=True)
class StepLaw:
  """lr = 1.79 N^-0.713 D^0.307, batch = 0.58 D^0.571 tokens (arXiv 2503.04715)."""

  name: str = "steplaw"

  def lr(self, run: TrainingRun) -> float:
    """The peak learning rate."""
    return 1.79 * run.params**-0.713 * run.tokens**0.307

  def batch_tokens(self, run: TrainingRun) -> float:
    """Tokens of a batch."""
    return 0.58 * run.tokens**0.571


DEEPSEEK_LR, DEEPSEEK_BATCH = PowerLaw(0.3118, -0.1250), PowerLaw(0.2920, 0.3271)
HYPERPARAM_LAWS: dict[str, HyperparamLaw] = {
  "deepseek": ComputeLaw("deepseek", DEEPSEEK_LR, DEEPSEEK_BATCH),
  "steplaw": StepLaw(),
}


@dataclasses.dataclass(frozen=True)
class Allocation:
  """How to spend a compute budget: model scale in FLOPs per token, and tokens. Their product is `flops`."""

  flops: float
  scale: float
  tokens: float


@dataclasses.dataclass(frozen=True)
class AllocationLaw:
  """The compute-optimal model scale M_opt as a power law of compute; D_opt is what is left: C / M_opt."""

  name: str
  scale_law: PowerLaw

  def optimal(self, flops: float) -> Allocation:
    """The optimal allocation of `flops`."""
    scale = self.scale_law(flops)
    return Allocation(flops, scale, flops / scale)

  def for_tokens(self, tokens: float) -> Allocation:
    """The compute at which `tokens` are optimal, and its allocation."""
    # D = C / (k C^a), so C = (D k)^(1 / (1 - a))
    flops = (tokens * self.scale_law.coefficient) ** (1 / (1 - self.scale_law.exponent))
    return self.optimal(flops)


# DeepSeek LLM, eq. 4. Its D_opt = 5.8316 C^0.4757 is the same law: the product of both is 1.0001 C.
DEEPSEEK_ALLOCATION = AllocationLaw("deepseek", PowerLaw(0.1715, 0.5243))


def optimal_allocation(flops: float, law: AllocationLaw = DEEPSEEK_ALLOCATION) -> Allocation:
  """The compute-optimal model scale and tokens of a budget. Raises ConfigError unless `flops` is positive."""
  if not flops > 0:
    raise ConfigError(f"flops={flops}: a compute budget is positive")
  return law.optimal(flops)


def hyperparam_law(name: str) -> HyperparamLaw:
  """A law of HYPERPARAM_LAWS. Raises ConfigError for another name."""
  if name not in HYPERPARAM_LAWS:
    raise ConfigError(
      f"law {name!r}: expected one of {', '.join(HYPERPARAM_LAWS)}, or a file that hparams --json wrote"
    )
  return HYPERPARAM_LAWS[name]
