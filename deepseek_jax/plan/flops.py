"""Parameters and training FLOPs of a config, exact, with nothing allocated."""

import dataclasses
import functools
import math

import jax
from jax.sharding import AbstractDevice

from deepseek_jax.config import MeshConfig
from deepseek_jax.mesh import abstract_mesh
from deepseek_jax.model.transformer import init_params
from deepseek_jax.model_config import ModelConfig

# What is traced for machines that are not here: it has each kernel that a config may name.
DEVICE = AbstractDevice("TPU v5p", 1, "tpu")


def abstract_params(config: ModelConfig, mesh: MeshConfig):
  """(params, buffers) as abstract arrays: shapes, dtypes and layouts on a mesh of resolved sizes that need not exist."""
  with jax.sharding.use_abstract_mesh(abstract_mesh(mesh, DEVICE)):
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


@dataclasses.dataclass(frozen=True)
class Parameters:
  """Counts, router biases included. `active` is what a token passes through; `non_embedding` is `active` less the input
  embedding. `mtp` is what multi-token prediction adds; the other counts leave it out."""

  total: int
  active: int
  non_embedding: int
  mtp: int


@functools.cache  # a plan asks several times, and tracing the model takes a moment
def count_parameters(config: ModelConfig) -> Parameters:
  """Parameters of the model that the config describes, counted on its shapes."""
  params, buffers = abstract_params(config, MeshConfig(data=1))
  leaves = jax.tree.leaves_with_path(params) + jax.tree.leaves_with_path(buffers)
  sizes = [(path[0].key, math.prod(leaf.shape)) for path, leaf in leaves]
  mtp = sum(size for name, size in sizes if name == "mtp_layers")
  total = sum(size for _, size in sizes) - mtp
  moe = config.moe
  idle = config.num_moe_layers * (moe.num_routed_experts - moe.num_experts_per_token) * 3 * config.embed * moe.mlp
  return Parameters(total, total - idle, total - idle - config.vocab * config.embed, mtp)


@dataclasses.dataclass(frozen=True)
class TrainingFlops:
  """FLOPs of matrix products per trained token, forward and backward, without recomputation.

  `matmul` is 6 per parameter that multiplies, of routed experts those that a token chose. Attention scores and values come
  on top: `attention_full` counts every pair of positions, as XLA does; `attention_causal` the pairs that a causal model
  needs, on average (seq + 1) / 2. Latent attention counts in its expanded form, each depth of multi-token prediction
  as a layer of all positions (as it runs: the last ones mean nothing) with its own pass through the head.
  """

  matmul: float
  attention_causal: float
  attention_full: float

  @property
  def causal(self):
    return self.matmul + self.attention_causal

  @property
  def full(self):
    return self.matmul + self.attention_full


def training_flops(config: ModelConfig, seq: int) -> TrainingFlops:
  """FLOPs per token at sequence length `seq`: a product of [m, k] and [k, n] is 2mkn, its backward twice that."""
  head, moe = config.vocab * config.embed, config.moe
  matrices = head * (1 + config.num_mtp_layers)
  for path, leaf in jax.tree.leaves_with_path(abstract_params(config, MeshConfig(data=1))[0]):
    names = [part.key for part in path]
    if names[-1] == "kernel" and names[0] != "head":
      share = moe.num_experts_per_token / moe.num_routed_experts if "experts" in names else 1
      matrices += math.prod(leaf.shape) * share
  a = config.attention
  key, value = (a.qk_nope_head_dim + a.qk_rope_head_dim, a.v_head_dim) if a.kind == "mla" else (a.head_dim,) * 2
  pairs = a.heads * (key + value)  # multiply-adds per pair of positions
  pairs *= config.layers + config.num_mtp_layers
  return TrainingFlops(6 * matrices, attention_causal=6 * pairs * (seq + 1) / 2, attention_full=6 * pairs * seq)
