"""Parameter counts and training FLOPs of a config: exact, and without allocating arrays."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice

from deepseek_jax.config import Config
from deepseek_jax.config_sections import MeshConfig
from deepseek_jax.errors import ConfigError
from deepseek_jax.kernels.attention.api import count_visible_pairs
from deepseek_jax.mesh import abstract_mesh
from deepseek_jax.model.attention_kinds import ATTENTION
from deepseek_jax.model.paged_cache import token_elements
from deepseek_jax.model.transformer import init_params
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.plan.attention import ATTENTION_PLANS
from deepseek_jax.sharding import UNSHARDED_PARAMS, axis_rules
from deepseek_jax.typing import Params

# Programs are traced for this device whatever the topology: it has every kernel that a config may name.
TRACE_DEVICE = AbstractDevice("TPU v5p", 1, "tpu")


def abstract_params(config: ModelConfig, mesh: MeshConfig, unsharded: bool = False) -> tuple[Params, Params]:
  """(params, buffers) as abstract arrays with shapes, dtypes and shardings on a mesh of resolved sizes.

  No device is used. The trees are shared between calls: do not change them.

  Args: `unsharded`: as ZeRO 1 and 2 gather them for a step.
  """
  return _trace_params(config, mesh, jax.dtypes.canonicalize_dtype(config.param_dtype), unsharded)


# A start and a plan need them several times, and tracing the model takes seconds. The rules of axes that the trace reads
# are an argument, so that the cache knows of them.
@functools.cache
def _trace_params(config: ModelConfig, mesh: MeshConfig, dtype: jnp.dtype, unsharded: bool) -> tuple[Params, Params]:
  rules = UNSHARDED_PARAMS if unsharded else {}
  with jax.sharding.use_abstract_mesh(abstract_mesh(mesh, TRACE_DEVICE)), axis_rules(rules):
    return jax.eval_shape(lambda: init_params(config, key=None))


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
  """Parameters of a model, router biases included. Only `mtp` counts those of multi-token prediction."""

  total: int
  active: int  # used by one token
  non_embedding: int  # `active` without the input embedding
  mtp: int


@functools.cache
def count_parameters(config: ModelConfig) -> ParameterCounts:
  """Parameters of the model that the config describes, counted on its shapes."""
  params, buffers = abstract_params(config, MeshConfig(data=1))
  leaves = jax.tree.leaves_with_path(params) + jax.tree.leaves_with_path(buffers)
  sizes = [(path[0].key, math.prod(leaf.shape)) for path, leaf in leaves]
  mtp = sum(size for name, size in sizes if name == "mtp_layers")
  total = sum(size for _, size in sizes) - mtp
  moe = config.moe
  inactive_experts = config.num_moe_layers * (moe.num_routed_experts - moe.num_experts_per_token)
  active = total - inactive_experts * 3 * config.embed * moe.mlp
  return ParameterCounts(total, active, active - config.vocab * config.embed, mtp)


def cache_elements_per_token(config: ModelConfig) -> int:
  """Elements of the decoding cache per token, in all layers, without those of multi-token prediction."""
  return config.layers * token_elements(ATTENTION[config.attention.kind].token_shapes(config.attention))


@dataclasses.dataclass(frozen=True)
class TrainingFlops:
  """FLOPs of matmuls per trained token, forward and backward, without recomputation.

  - `matmul`: 6 per parameter that multiplies. Of the routed experts, those that a token chose.
  - `attention_full`: attention scores and values, for every pair of positions, as XLA computes them.
  - `attention_causal`: the same for the pairs that a causal model needs, on average (seq + 1) / 2 per token, or with a
    sliding window nearly the window.

  MLA counts in its expanded form. Each depth of multi-token prediction counts as a layer of all positions, since that
  is what runs, with a pass of its own through the head.
  """

  matmul: float
  attention_causal: float
  attention_full: float

  @property
  def causal(self) -> float:
    """FLOPs per token with causal attention: what MFU is based on."""
    return self.matmul + self.attention_causal

  @property
  def full(self) -> float:
    """FLOPs per token with attention between all pairs of positions."""
    return self.matmul + self.attention_full


def training_flops(config: ModelConfig, seq: int) -> TrainingFlops:
  """FLOPs per token at sequence length `seq`: a product of [m, k] and [k, n] is 2mkn, its backward pass twice that."""
  head, moe = config.vocab * config.embed, config.moe
  matmul_params: float = head * (1 + config.num_mtp_layers)
  for path, leaf in jax.tree.leaves_with_path(abstract_params(config, MeshConfig(data=1))[0]):
    names = [entry.key for entry in path]
    if names[-1] == "kernel" and names[0] != "head":
      active = moe.num_experts_per_token / moe.num_routed_experts if "experts" in names else 1
      matmul_params += math.prod(leaf.shape) * active
  a = config.attention
  # Multiply-accumulates per pair of positions, in all layers.
  macs_per_pair = a.heads * sum(ATTENTION_PLANS[a.kind].head_dims(a)) * (config.layers + config.num_mtp_layers)
  return TrainingFlops(
    6 * matmul_params,
    attention_causal=6 * macs_per_pair * count_visible_pairs(seq, a.window) / seq,
    attention_full=6 * macs_per_pair * seq,
  )


def steps_for_flops(config: Config, flops: float) -> int:
  """Updates of the config's batch that spend `flops`, counted with causal attention: for comparisons at equal FLOPs.

  Raises ConfigError where `flops` are fewer than those of one update.
  """
  step = training_flops(config.model, config.data.seq).causal * config.data.seq * config.train.global_batch
  if not flops >= step:
    raise ConfigError(
      f"flops={flops:g} are fewer than those of one update, {step:.3g}: spend more, or take a smaller batch"
    )
  return round(flops / step)
