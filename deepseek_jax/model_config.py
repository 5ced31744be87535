"""Every setting of a model and its default: what decides the shapes of its parameters and what it computes."""

import dataclasses
from collections.abc import Callable

from deepseek_jax.errors import ConfigError
from deepseek_jax.schema import Section, field, table_keys


@dataclasses.dataclass(frozen=True)
class YarnConfig(Section, path="model.attention.yarn"):
  factor: float = field(1.0, "factor by which the context is extended; 1: off, as in 4K pre-training", at_least=1)
  original_seq: int = field(4096, "context length before the extension", at_least=1)
  beta_fast: float = field(32.0, "turns over original_seq above which a frequency is unchanged", above=0)
  beta_slow: float = field(1.0, "turns below which a frequency is divided by factor", above=0)
  mscale: float = field(1.0, "weight of 0.1 ln(factor) in the scale of cos and sin; 0: unset", at_least=0)
  mscale_all_dim: float = field(
    1.0, "the same, of the divisor of that scale; MLA's softmax scale grows with its square. 0: unset", at_least=0
  )

  def check(self) -> None:
    if self.beta_fast <= self.beta_slow:
      raise ConfigError(
        f"model.attention.yarn.beta_fast={self.beta_fast} must be above beta_slow={self.beta_slow}: frequencies between "
        "the two are interpolated"
      )


@dataclasses.dataclass(frozen=True)
class AttentionKind:
  """A row of ATTENTION_KINDS: what a config must know of an attention kind. Strings name fields of AttentionConfig.

  Attributes:
    shape_fields: fields that decide the shapes of its parameters. It reads no others; kinds may share some.
    required: those of them that must be above 0.
    rope_dim: the width of the part of a head with RoPE.
    latent_dims: widths of the dimensions of its parameters with the logical axis `latent`.
    head_counts: config -> numbers of heads, which `mesh.tensor` shards.
    check: raises ConfigError where its fields do not fit each other.
  """

  shape_fields: tuple[str, ...]
  required: tuple[str, ...]
  rope_dim: str
  latent_dims: tuple[str, ...]
  head_counts: Callable[["AttentionConfig"], tuple[str, ...]]
  check: Callable[["AttentionConfig"], None] = lambda config: None


def _check_gqa(config: "AttentionConfig") -> None:
  if config.heads % config.kv_heads:
    raise ConfigError(
      f"model.attention.heads={config.heads} is not a multiple of model.attention.kv_heads={config.kv_heads}: "
      "each key head belongs to the same number of query heads; change one of them"
    )


ATTENTION_KINDS = {
  "gqa": AttentionKind(
    shape_fields=("heads", "kv_heads", "head_dim"),
    required=(),
    rope_dim="head_dim",
    latent_dims=(),
    head_counts=lambda config: ("heads",) if config.kv_heads == 1 else ("heads", "kv_heads"),  # one is replicated
    check=_check_gqa,
  ),
  "mla": AttentionKind(
    shape_fields=("heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    required=("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    rope_dim="qk_rope_head_dim",
    latent_dims=("q_lora_rank", "kv_lora_rank"),
    head_counts=lambda config: ("heads",),
  ),
}
ATTENTION_SHAPE_FIELDS = {name for row in ATTENTION_KINDS.values() for name in row.shape_fields}


@dataclasses.dataclass(frozen=True)
class AttentionConfig(Section, path="model.attention"):
  kind: str = field("gqa", "gqa (also MHA and MQA) or mla (multi-head latent attention)", choices=ATTENTION_KINDS)
  heads: int = field(4, "query heads", at_least=1)
  kv_heads: int = field(4, "gqa: key and value heads; as many as heads is multi-head attention", at_least=1)
  head_dim: int = field(32, "gqa: width of one head", at_least=2)
  q_lora_rank: int = field(0, "mla: width of the query latent; 0: queries without a latent", at_least=0)
  kv_lora_rank: int = field(0, "mla: width of the key and value latent, which is what is cached", at_least=0)
  qk_nope_head_dim: int = field(0, "mla: width of the part of a query or key head without RoPE", at_least=0)
  qk_rope_head_dim: int = field(0, "mla: width of the part with RoPE, whose key all heads share", at_least=0)
  v_head_dim: int = field(0, "mla: width of a value head", at_least=0)
  latent_norm_eps: float = field(
    1e-6, "mla: epsilon of the norms of both latents; every release hard-codes 1e-6", above=0
  )
  window: int = field(
    0, "sliding window: the positions that a position attends to, itself included; 0: all up to itself", at_least=0
  )
  rope_theta: float = field(10_000.0, "base of the rotary frequencies", above=1)
  dropout: float = field(0.0, "dropout of attention probabilities", at_least=0, below=1)
  kv_comm: str = field(
    "gather", "context parallelism: all-gather or ring of keys and values (of MLA: the latents); no kernel does the ring",
    choices=("gather", "ring"),
  )  # fmt: skip
  implementation: str = field(
    "auto", "xla, pallas (this platform's fused kernel; an error where it has none for a shape), or auto: pallas where possible",
    choices=("auto", "xla", "pallas"),
  )  # fmt: skip
  yarn: YarnConfig = YarnConfig()

  def check(self) -> None:
    row = ATTENTION_KINDS[self.kind]
    for name in row.required:
      if not getattr(self, name):
        raise ConfigError(f"model.attention.kind={self.kind} needs model.attention.{name}: set it above 0")
    row.check(self)
    if self.dropout and self.implementation == "pallas":
      raise ConfigError(
        f"model.attention.implementation=pallas with model.attention.dropout={self.dropout}: kernels have no dropout; use auto"
      )
    if self.kv_comm == "ring" and self.implementation == "pallas":
      raise ConfigError("model.attention.implementation=pallas with kv_comm=ring: kernels need gather, or use auto")
    if self.rope_dim % 2:
      raise ConfigError(
        f"model.attention.{row.rope_dim}={self.rope_dim} is odd: rotary embeddings need pairs; use an even width"
      )

  @property
  def rope_dim(self) -> int:
    """Width of the part of a head with RoPE."""
    return getattr(self, ATTENTION_KINDS[self.kind].rope_dim)


@dataclasses.dataclass(frozen=True)
class MoEConfig(Section, path="model.moe"):
  num_routed_experts: int = field(0, "routed experts of each MoE layer; 0: a dense model", at_least=0)
  num_shared_experts: int = field(
    0, "shared experts, which every token goes through, fused into one SwiGLU", at_least=0
  )
  num_experts_per_token: int = field(0, "routed experts of each token (top-k)", at_least=0)
  mlp: int = field(0, "inner width of one expert", at_least=0)
  router: str = field(
    "topk", "the module that chooses a token's experts", choices=table_keys("model.router_kinds", "ROUTERS")
  )
  score: str = field(
    "softmax", "affinity from the router's logits; V3: sigmoid", choices=table_keys("model.router", "SCORES")
  )
  num_expert_groups: int = field(1, "groups of experts (a group is a device in V2, a node in V3)", at_least=1)
  topk_groups: int = field(1, "groups that a token's experts may come from", at_least=1)
  group_score: str = field(
    "max", "score of a group: its best expert (V2), or the sum of its best two (V3)",
    choices=table_keys("model.router", "GROUP_SCORES"),
  )  # fmt: skip
  router_bias: bool = field(
    False,
    "the router has a RouterBias, which balance.bias_rule moves; that of topk is added to the scores, for the selection only (V3 eq. 16)",
  )
  norm_topk_prob: bool = field(False, "divide the weights of a token's experts by their sum (V3)")
  route_scale: float = field(1.0, "factor of the experts' weights", above=0)
  dispatch: str = field(
    "ragged", "ragged (tokens sorted by expert, dropless), dense (all experts on all tokens: the reference), capacity (V2's token "
    "dropping)",
    choices=table_keys("model.dispatch", "DISPATCH"),
  )  # fmt: skip
  implementation: str = field(
    "auto", "grouped matmuls in compute_dtype: xla, pallas (this platform's kernel; an error where it has none for a shape), or auto: "
    "pallas where possible",
    choices=("auto", "xla", "pallas"),
  )  # fmt: skip
  buffer_factor: float = field(
    0.0,
    "expert parallelism: size of the expert buffer as a multiple of an even load; 0: the worst case, without overflow",
    at_least=0,
  )
  capacity_factor: float = field(
    1.0, "dispatch=capacity: budget of a group of experts in training, as a multiple of an even load", above=0
  )
  no_drop_fraction: float = field(
    0.1, "dispatch=capacity: fraction of sequences of which no token is dropped (V2: about 10%)", at_least=0, at_most=1
  )

  def check(self) -> None:
    experts, groups = self.num_routed_experts, self.num_expert_groups
    if not experts:
      return
    for name in ("num_experts_per_token", "mlp"):
      if not getattr(self, name):
        raise ConfigError(f"model.moe.num_routed_experts={experts} needs model.moe.{name}: set it above 0")
    if experts % groups or (groups > 1 and self.group_score == "top2_sum" and experts // groups < 2):
      raise ConfigError(
        f"model.moe.num_routed_experts={experts} does not fit model.moe.num_expert_groups={groups} with "
        f"group_score={self.group_score}: groups are equal, and top2_sum needs two experts in each"
      )
    if 0 < self.buffer_factor < 1:
      raise ConfigError(
        f"model.moe.buffer_factor={self.buffer_factor} overflows under an even load: set it to 1 or more, or 0 for the worst case"
      )
    if self.dispatch == "capacity" and groups < 2:
      raise ConfigError(
        "model.moe.dispatch=capacity limits the load of each group of experts, and there is one group, which has all: "
        "set model.moe.num_expert_groups (with topk_groups equal to it, routing is not limited to groups), or dispatch=ragged"
      )
    if self.topk_groups > groups:
      raise ConfigError(f"model.moe.topk_groups={self.topk_groups} is above model.moe.num_expert_groups={groups}")
    reachable = experts // groups * self.topk_groups
    if self.num_experts_per_token > reachable:
      raise ConfigError(
        f"model.moe.num_experts_per_token={self.num_experts_per_token}, but {self.topk_groups} of {groups} groups hold "
        f"{reachable} experts: choose fewer experts, or more groups"
      )
    if self.router == "hash":
      self.check_hash()

  def check_hash(self) -> None:
    """Raises ConfigError where router=hash, which reads token ids alone, is told what else to choose experts by."""
    if self.router_bias:
      raise ConfigError(
        "model.moe.router_bias=True with model.moe.router=hash: token ids choose the experts, and no bias changes that; "
        "set model.moe.router_bias=false and balance.bias_update_rate=0"
      )
    if self.topk_groups < self.num_expert_groups:
      raise ConfigError(
        f"model.moe.topk_groups={self.topk_groups} of num_expert_groups={self.num_expert_groups} with model.moe.router=hash: "
        f"token ids choose from all experts; set model.moe.topk_groups={self.num_expert_groups}"
      )


@dataclasses.dataclass(frozen=True)
class Fp8Config(Section, path="model.fp8"):
  forward: bool = field(True, "precision=fp8: GEMMs of the forward pass are in FP8")
  dgrad: bool = field(True, "precision=fp8: GEMMs of activation gradients (dgrad) are in FP8")
  wgrad: bool = field(True, "precision=fp8: GEMMs of weight gradients (wgrad) are in FP8")
  pow2_scales: bool = field(False, "FP8 scales are powers of two (UE8M0)")
  block: int = field(
    128,
    "size of quantization tiles, and of the contraction between promotions to float32; V3: 128",
    choices=(128, 256, 512),
  )
  implementation: str = field(
    "auto", "xla, pallas (this platform's kernels; an error where it has none for a shape), or auto: pallas where possible",
    choices=("auto", "xla", "pallas"),
  )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section, path="model"):
  vocab: int = field(272, "rows of the embedding and of the output head", at_least=2)
  embed: int = field(128, "width of the residual stream", at_least=1)
  layers: int = field(4, "transformer blocks, not counting those of multi-token prediction", at_least=1)
  first_dense_layers: int = field(0, "of an MoE model: number of first layers with a dense SwiGLU", at_least=0)
  num_mtp_layers: int = field(0, "depth of multi-token prediction (V3 section 2.2); 0: none", at_least=0)
  mlp: int = field(384, "inner width of the SwiGLU of dense layers", at_least=1)
  norm_eps: float = field(1e-6, "epsilon of RMSNorm", above=0)
  init_std: float = field(0.006, "standard deviation of every initial matrix (all DeepSeek papers: 0.006)", above=0)
  tied_embeddings: bool = field(False, "the output head is the embedding; no DeepSeek model does this")
  dropout: float = field(
    0.0, "dropout of the two outputs of each block, before the residual additions", at_least=0, below=1
  )
  param_dtype: str = field("float32", "dtype of the master parameters", choices=("float32", "float64"))
  compute_dtype: str = field(
    "bfloat16", "dtype of activations and matrix products; float32 is full float32 on every chip",
    choices=("bfloat16", "float32", "float64"),
  )  # fmt: skip
  precision: str = field(
    "bf16", "GEMMs of linear layers and experts: bf16 (in compute_dtype) or fp8 (V3 section 3.3); embedding, head, router, norms "
    "and the attention core stay in compute_dtype or float32",
    choices=("bf16", "fp8"),
  )  # fmt: skip
  remat: str = field(
    "full", "what the backward pass recomputes: none (but attention scores with MLA, dropout or float64, and on CPUs), dots (all but matrix "
    "products), full (each block), offload (each block, whose input is offloaded to host memory)",
    choices=("none", "full", "dots", "offload"),
  )  # fmt: skip
  fp8: Fp8Config = Fp8Config()
  attention: AttentionConfig = AttentionConfig()
  moe: MoEConfig = MoEConfig()

  def check(self) -> None:
    if (self.param_dtype == "float64") != (self.compute_dtype == "float64"):
      raise ConfigError(
        f"model.param_dtype={self.param_dtype} with model.compute_dtype={self.compute_dtype}: "
        "float64 runs are float64 throughout; set both to float64 or neither"
      )
    if self.precision == "fp8" and self.compute_dtype == "float64":
      raise ConfigError(
        "model.precision=fp8 with model.compute_dtype=float64: FP8 GEMMs do not give float64 precision; "
        "set compute_dtype to bfloat16 or float32"
      )
    if self.precision == "fp8" and self.moe.num_routed_experts and self.moe.dispatch == "dense":
      raise ConfigError(
        "model.precision=fp8 with model.moe.dispatch=dense, which is the reference in compute_dtype: set dispatch=ragged"
      )
    if self.first_dense_layers and (not self.moe.num_routed_experts or self.first_dense_layers > self.layers):
      raise ConfigError(
        f"model.first_dense_layers={self.first_dense_layers} with model.layers={self.layers} and "
        f"model.moe.num_routed_experts={self.moe.num_routed_experts}: it counts the dense layers before the MoE layers; "
        "set model.first_dense_layers=0 in a dense model, and at most model.layers in an MoE model"
      )

  def for_sampling(self) -> "ModelConfig":
    """This model for prefill and decoding: without an expert buffer limit, without kernels, without FP8.

    A few tokens are no even load of experts, and gain nothing by FP8. Kernels are not tested at a prompt's shapes.
    """
    moe = dataclasses.replace(self.moe, buffer_factor=0.0, implementation="xla")
    attention = dataclasses.replace(self.attention, implementation="xla")
    return dataclasses.replace(self, moe=moe, attention=attention, precision="bf16")

  @property
  def is_random(self) -> bool:
    """Whether training draws random numbers in a layer: for dropout, or for the sequences of which no token is dropped."""
    return self.dropout > 0 or self.attention.dropout > 0 or self.moe.dispatch == "capacity"

  @property
  def num_dense_layers(self) -> int:
    """Number of blocks with a dense SwiGLU."""
    return self.first_dense_layers if self.moe.num_routed_experts else self.layers

  @property
  def num_moe_layers(self) -> int:
    """Number of blocks with a mixture of experts, not counting those of multi-token prediction."""
    return self.layers - self.num_dense_layers


# Fields of the model that decide which arrays there are, and their shapes.
SHAPE_FIELDS = {
  "vocab", "embed", "layers", "first_dense_layers", "num_mtp_layers", "mlp", "tied_embeddings", "moe.num_routed_experts",
  "moe.num_shared_experts", "moe.mlp", "moe.router_bias", "attention.kind",
  *(f"attention.{name}" for name in ATTENTION_SHAPE_FIELDS),
}  # fmt: skip
