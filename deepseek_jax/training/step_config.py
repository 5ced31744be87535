"""The sections of a config that the program of a step is made from."""

import dataclasses
from typing import Self

from deepseek_jax.config import Config
from deepseek_jax.config_sections import BalanceConfig, OptimizerConfig, ParallelConfig
from deepseek_jax.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class StepConfig:
  """What fixes the program of a step. Runs that differ in other fields, as their length, share one compiled program.

  loss_chunk, label_smoothing, z_loss: as in TrainConfig. layer_rms: as in LogConfig.
  document_start: the token that starts each document, beyond which attention does not look. None: it does.
  """

  model: ModelConfig
  optimizer: OptimizerConfig = OptimizerConfig()
  parallel: ParallelConfig = ParallelConfig()
  balance: BalanceConfig = BalanceConfig()
  loss_chunk: int = 512
  label_smoothing: float = 0.0
  z_loss: float = 0.0
  document_start: int | None = None
  layer_rms: bool = False
  seed: int = 0

  @classmethod
  def of(cls, config: Config, bos: int) -> Self:
    """The sections of `config`. `bos` is the token with which the tokenizer starts a document."""
    train = config.train
    return cls(
      config.model, config.optimizer, config.parallel, config.balance, train.loss_chunk, train.label_smoothing,
      train.z_loss, bos if config.data.mask_documents else None, config.log.layer_rms, config.seed,
    )  # fmt: skip
