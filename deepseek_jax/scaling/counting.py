"""Model scale as papers measure it: FLOPs per token by convention, parameters, and the ratios of a mixture of experts."""

import dataclasses
from typing import NamedTuple

from deepseek_jax.config import Config
from deepseek_jax.errors import ConfigError
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.plan.flops import count_parameters, training_flops

CONVENTIONS = ("deepseek", "exact", "6N", "chinchilla")


class ModelParameters(NamedTuple):
  """Parameters of a model, without those of multi-token prediction. `active`: of the routed experts, those of one token.

  Non-embedding counts leave out the embedding and the output head.
  """

  total: int
  active: int
  nonembedding: int
  active_nonembedding: int


class MoEStats(NamedTuple):
  """Ratios of a mixture of experts.

  Attributes:
    granularity: inner width of a dense SwiGLU of 8/3 of the model's width over that of one expert (arXiv 2402.07871).
    sparsity: fraction of the routed experts that a token does not use (arXiv 2501.12370).
    activation_ratio: experts that a token uses over all of them, shared ones included (arXiv 2507.17702).
  """

  granularity: float
  sparsity: float
  activation_ratio: float


def count_params(config: Config | ModelConfig) -> ModelParameters:
  """Parameters of the model that the config describes, counted on its shapes."""
  config = _model(config)
  counts = count_parameters(config)
  vocabulary = config.vocab * config.embed * (1 if config.tied_embeddings else 2)
  return ModelParameters(counts.total, counts.active, counts.total - vocabulary, counts.active - vocabulary)


def moe_stats(config: Config | ModelConfig) -> MoEStats:
  """Granularity, sparsity and activation ratio. Raises ConfigError for a dense model."""
  config = _model(config)
  moe = config.moe
  if not moe.num_routed_experts:
    raise ConfigError("moe_stats needs a mixture of experts: model.moe.num_routed_experts is 0")
  return MoEStats(
    granularity=8 / 3 * config.embed / moe.mlp,
    sparsity=1 - moe.num_experts_per_token / moe.num_routed_experts,
    activation_ratio=(moe.num_experts_per_token + moe.num_shared_experts)
    / (moe.num_routed_experts + moe.num_shared_experts),
  )


def deepseek_flops_per_token(layers: int, embed: int, seq: int) -> float:
  """M = 72 n_layer d_model^2 + 12 n_layer d_model l_seq (DeepSeek LLM, arXiv 2401.02954, eq. 2)."""
  return 72.0 * layers * embed**2 + 12.0 * layers * embed * seq


def _model(config: Config | ModelConfig) -> ModelConfig:
  return config.model if isinstance(config, Config) else config


def nonembedding_flops_per_token(
  config: Config | ModelConfig, convention: str = "deepseek", seq: int | None = None
) -> float:
  """Training FLOPs per token, the model scale of a scaling law.

  Conventions:

  - deepseek: M of DeepSeek LLM. For a dense model with grouped-query or multi-head attention it is the paper's formula,
    which takes every layer for multi-head attention and an MLP of 8 d^2. For others it is `exact`.
  - exact: what the config's own layers multiply: 6 per active parameter of a matrix, and 6 l h (d_qk + d_v) per layer of
    attention between all pairs of positions, or of a sliding window. With layers of multi-token prediction.
  - 6N: 6 per active non-embedding parameter, without attention (Kaplan et al. 2020).
  - chinchilla: Hoffmann et al. 2022, appendix F: with the embedding, the head and the softmax, which no other counts.

  Args:
    convention: one of CONVENTIONS.
    seq: the sequence length; None: the config's, which has to be a whole one then.

  Raises ConfigError for another convention, and for a model without seq.
  """
  if convention not in CONVENTIONS:
    raise ConfigError(f"convention={convention!r}: expected one of {', '.join(CONVENTIONS)}")
  if seq is None:
    if not isinstance(config, Config):
      raise ConfigError("nonembedding_flops_per_token of a model alone needs seq, its sequence length")
    seq = config.data.seq
  config = _model(config)
  is_dense_gqa = not config.moe.num_routed_experts and config.attention.kind == "gqa"
  if convention == "deepseek" and is_dense_gqa:
    return deepseek_flops_per_token(config.layers, config.embed, seq)
  if convention == "6N":
    return 6.0 * count_params(config).active_nonembedding
  vocabulary = 6.0 * config.vocab * config.embed
  if convention == "chinchilla":
    # Its softmax: 3 h l per token, forward. A table look-up is counted as a product, as the paper does.
    without_mtp = dataclasses.replace(config, num_mtp_layers=0)
    softmax = 9.0 * config.attention.heads * seq * config.layers
    return training_flops(without_mtp, seq).full + vocabulary + softmax
  flops = training_flops(config, seq)
  window = config.attention.window
  attention = flops.attention_causal if window and window < seq else flops.attention_full
  return flops.matmul + attention - vocabulary * (1 + config.num_mtp_layers)
