"""Parameters and training FLOPs of a config, exact, with nothing allocated."""

import dataclasses
import math

import jax

from deepseek_jax.config import MeshConfig
from deepseek_jax.mesh import abstract_mesh
from deepseek_jax.model.transformer import new_params
from deepseek_jax.model_config import ModelConfig


def abstract_params(config: ModelConfig, mesh: MeshConfig):
  """Nested dict of abstract arrays: shapes, dtypes and layouts on a mesh of resolved sizes that need not exist."""
  with jax.sharding.use_abstract_mesh(abstract_mesh(mesh)):
    return jax.eval_shape(lambda: new_params(config, jax.random.key(0)))[0]


@dataclasses.dataclass(frozen=True)
class Parameters:
  """Counts. `active` is what a token passes through; `non_embedding` is `active` less the input embedding."""

  total: int
  active: int
  non_embedding: int


def count_parameters(config: ModelConfig) -> Parameters:
  """Parameters of the model that the config describes, counted on its shapes."""
  total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config, MeshConfig(data=1))))
  return Parameters(total, total, total - config.vocab * config.embed)


@dataclasses.dataclass(frozen=True)
class TrainingFlops:
  """FLOPs of matrix products per trained token, forward and backward, without recomputation.

  `matmul` is 6 per parameter that multiplies. Attention scores and values come on top: `attention_full` counts every
  pair of positions, as XLA does; `attention_causal` the pairs that a causal model needs, on average (seq + 1) / 2.
  """

  matmul: int
  attention_causal: float
  attention_full: int

  @property
  def causal(self):
    return self.matmul + self.attention_causal

  @property
  def full(self):
    return self.matmul + self.attention_full


def training_flops(config: ModelConfig, seq: int) -> TrainingFlops:
  """FLOPs per token at sequence length `seq`: a product of [m, k] and [k, n] is 2mkn, its backward twice that."""
  a = config.attention
  projections = 2 * config.embed * a.head_dim * (a.heads + a.kv_heads)  # q and o, k and v
  matrices = config.layers * (projections + 3 * config.embed * config.mlp) + config.embed * config.vocab
  scores_and_values = config.layers * 2 * a.heads * a.head_dim  # multiply-adds per pair of positions
  return TrainingFlops(
    matmul=6 * matrices,
    attention_causal=6 * scores_and_values * (seq + 1) / 2,
    attention_full=6 * scores_and_values * seq,
  )


# Dense bfloat16 peak of a chip in FLOP/s, from the vendors' data sheets, by a part of `device_kind`.
PEAK_FLOPS = {
  "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12,
  "TPU v6 lite": 918e12, "TPU v6e": 918e12, "TPU7x": 2307e12,
  "A100": 312e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "B200": 2250e12,
}  # fmt: skip


def peak_flops(device_kind: str) -> float | None:
  """bfloat16 peak of a chip, or None where it is not known (CPUs)."""
  return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)
