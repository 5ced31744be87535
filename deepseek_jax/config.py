"""Every setting of a run and its default: frozen dataclasses, checked when made. `model_config.py` has the model's.

A config file (`configs/*.py`) names only what differs from these defaults. Its ConfigDict becomes a `Config` once, and
each module gets only its own section. Nothing here touches a device.
"""

import dataclasses
import math

from deepseek_jax.errors import ConfigError
from deepseek_jax.logical_axes import RULES
from deepseek_jax.model_config import ATTENTION_KINDS, ModelConfig
from deepseek_jax.schema import Section, field, table_keys

# Number of ids that a tokenizer may emit, known without installing it. byte: 256 bytes and the separator.
TOKENIZER_SIZES = {"byte": 257, "deepseek-llm": 100_015, "deepseek-v3": 128_815}


@dataclasses.dataclass(frozen=True)
class DataConfig(Section, path="data"):
  sources: tuple[str, ...] = field(
    ("python-stdlib",),
    "what to train on: python-stdlib, or files, folders and globs, also at gs:// or s3://, of .txt .py .md .jsonl[.gz|.zst] .parquet",
  )
  weights: tuple[float, ...] = field(
    (), "fraction of samples from each source; empty: in proportion to their size", above=0
  )
  tokenizer: str = field("byte", "byte, deepseek-llm, deepseek-v3, or the path of a tokenizer.json")
  seq: int = field(256, "tokens a sequence predicts", at_least=2)
  heldout_fraction: float = field(0.02, "fraction of documents held out for evaluation", above=0, below=1)
  mask_documents: bool = field(False, "attend within documents only; off in the DeepSeek recipes up to V3")
  text_field: str = field("text", "key of the text in .jsonl and .parquet records")
  cache: str = field("", "folder of packed data; empty: the user's cache folder")
  verify: bool = field(True, "check the checksums of packed data at start")

  def check(self) -> None:
    if not self.sources:
      raise ConfigError('data.sources is empty: name at least one, e.g. "python-stdlib"')
    if self.weights and len(self.weights) != len(self.sources):
      raise ConfigError(
        f"data.weights has {len(self.weights)} values for {len(self.sources)} data.sources: give one each, or none"
      )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Section, path="optimizer"):
  kind: str = field(
    "adamw", "AdamW, or Muon for hidden matrices and AdamW for the rest",
    choices=table_keys("optimizers.optimizer", "OPTIMIZERS"),
  )  # fmt: skip
  trainable: tuple[str, ...] = field(
    (),
    "paths of the parameters that are trained, with * for any text, as moe_layers/attn/*; the others are frozen. Empty: all",
  )
  clip: float = field(1.0, "global gradient norm above which gradients are scaled down", above=0)
  beta1: float = field(0.9, "AdamW's decay of the first moment", at_least=0, below=1)
  beta2: float = field(0.95, "AdamW's decay of the second moment", at_least=0, below=1)
  eps: float = field(1e-8, "AdamW's epsilon; DeepSeek publishes none before V4", above=0)
  weight_decay: float = field(0.1, "decoupled weight decay of matrices; norm scales have none", at_least=0)
  momentum: float = field(0.95, "Muon's momentum (V4: 0.95)", at_least=0, below=1)
  update_rms: float = field(
    0.18, "root mean square of Muon's updates (V4: 0.18; Moonlight: 0.2, near AdamW's)", above=0
  )
  moments_dtype: str = field(
    "float32", "dtype of the moments or the momentum between updates", choices=("bfloat16", "float32", "float64")
  )
  offload: bool = field(False, "keep the moments or the momentum in the host's memory between updates")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig(Section, path="schedule"):
  kind: str = field(
    "constant",
    "shape of the learning rate after warm-up",
    choices=table_keys("training.schedule", "SCHEDULE"),
  )
  peak: float = field(1e-3, "highest learning rate", above=0)
  warmup_steps: int = field(0, "linear warm-up from zero, in steps", at_least=0)
  warmup_tokens: int = field(0, "linear warm-up from zero, in tokens; replaces warmup_steps when above 0", at_least=0)
  steps: int = field(1000, "length in steps; milestones are fractions of it", at_least=1)
  tokens: int = field(0, "length in tokens; replaces steps when above 0", at_least=0)
  milestones: tuple[float, ...] = field(
    (),
    "fractions of the length: drops of multi_step; start and end of wsd's cosine, then its drops",
    at_least=0,
    at_most=1,
  )
  factors: tuple[float, ...] = field(
    (), "fractions of peak: after each milestone (multi_step), after the cosine and each drop (wsd), at the end (warmup_cosine)",
    at_least=0, at_most=1,
  )  # fmt: skip

  def check(self) -> None:
    given = len(self.milestones)
    milestones, factors = {
      "constant": (0, 0),
      "warmup_cosine": (0, 1),
      "multi_step": (max(1, given), max(1, given)),
      "wsd": (max(2, given), max(1, given - 1)),
    }[self.kind]
    if (len(self.milestones), len(self.factors)) != (milestones, factors):
      raise ConfigError(
        f"schedule.kind={self.kind} takes {milestones} milestones and {factors} factors, "
        f"got milestones={self.milestones} and factors={self.factors}"
      )
    if list(self.milestones) != sorted(self.milestones):
      raise ConfigError(f"schedule.milestones={self.milestones} must rise")
    mixed = self.warmup_tokens if not self.tokens else self.warmup_steps and not self.warmup_tokens
    if self.kind == "warmup_cosine" and mixed:
      raise ConfigError(
        "schedule.kind=warmup_cosine needs its warm-up and its length in the same unit: "
        "set warmup_steps with steps, or warmup_tokens with tokens"
      )


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section, path="mesh"):
  data: int = field(
    -1, "data parallelism: devices that replicate the model and share the batch; -1: the rest", at_least=-1
  )
  fsdp: int = field(
    1, "FSDP: devices that share the batch and shard parameters and optimizer state; -1: the rest", at_least=-1
  )
  expert: int = field(1, "expert parallelism: devices that share the experts, and the batch; -1: the rest", at_least=-1)
  tensor: int = field(
    1,
    "tensor and sequence parallelism: devices that share heads, inner widths, the vocabulary, and positions between blocks; "
    "-1: the rest",
    at_least=-1,
  )
  stage: int = field(1, "pipeline parallelism: devices that share the layers; -1: the rest", at_least=-1)
  context: int = field(
    1, "context parallelism: devices that share the positions of each sequence; -1: the rest", at_least=-1
  )

  def check(self) -> None:
    sizes = dataclasses.asdict(self)
    if 0 in sizes.values():
      raise ConfigError(f"mesh sizes are 1 or more, or -1 for the rest, got {sizes}")
    if list(sizes.values()).count(-1) > 1:
      raise ConfigError(f"only one mesh size may be -1, got {sizes}")


@dataclasses.dataclass(frozen=True)
class ParallelConfig(Section, path="parallel"):
  zero: int = field(
    3, "what stays sharded through a step: 1 optimizer state and master weights, 2 gradients as well, 3 the weights in use as well",
    at_least=1, at_most=3,
  )  # fmt: skip
  mla_latent: str = field(
    "replicated", "MLA on a tensor mesh: each device computes all latents, or those of its own positions (sharded)",
    choices=("replicated", "sharded"),
  )  # fmt: skip
  virtual_stages: int = field(
    1, "virtual stages of each stage (interleaved 1F1B): how often a microbatch passes through all stages", at_least=1
  )
  stage_layers: tuple[int, ...] = field(
    (),
    "number of layers of each of the stage x virtual_stages chunks, in order; empty: as even as possible",
    at_least=0,
  )


@dataclasses.dataclass(frozen=True)
class TrainConfig(Section, path="train"):
  steps: int = field(1000, "updates after which the run is finished", at_least=1)
  global_batch: int = field(16, "sequences per update", at_least=1)
  microbatch: int = field(
    0, "sequences per forward and backward pass, over all devices; 0: the whole batch", at_least=0
  )
  batch_ramp_from: int = field(
    0, "sequences per update at the start of a linear ramp to global_batch; 0: no ramp", at_least=0
  )
  batch_ramp_tokens: int = field(0, "tokens over which the ramp runs", at_least=0)
  loss_chunk: int = field(512, "positions per sequence whose logits exist at once in the loss", at_least=1)
  label_smoothing: float = field(0.0, "fraction of the target spread over the vocabulary", at_least=0, below=1)
  z_loss: float = field(0.0, "weight of the squared log of the softmax normalizer", at_least=0)
  max_skipped: int = field(
    10, "skipped updates in a row (gradients not finite, expert buffer overflow) after which the run stops", at_least=1
  )

  def check(self) -> None:
    micro, micro_name = (self.microbatch, "microbatch") if self.microbatch else (self.global_batch, "global_batch")
    for name, batch in (("global_batch", self.global_batch), ("batch_ramp_from", self.batch_ramp_from)):
      if batch % micro:
        raise ConfigError(
          f"train.{name}={batch} is not a multiple of train.{micro_name}={micro}: use {batch // micro * micro or micro}, "
          "or set train.microbatch to a divisor of both"
        )
    if bool(self.batch_ramp_from) != bool(self.batch_ramp_tokens):
      raise ConfigError("train.batch_ramp_from and train.batch_ramp_tokens go together: set both, or neither")
    if self.batch_ramp_from > self.global_batch:
      raise ConfigError(f"train.batch_ramp_from={self.batch_ramp_from} is above train.global_batch={self.global_batch}")


@dataclasses.dataclass(frozen=True)
class BalanceConfig(Section, path="balance"):
  expert_loss: float = field(
    0.0,
    "weight of the expert-level loss per sequence (MoE eq. 12, V2 eq. 23; V3's sequence-wise loss, eq. 17)",
    at_least=0,
  )
  device_loss: float = field(0.0, "weight of the device-level loss (MoE eq. 15, V2 eq. 26)", at_least=0)
  communication_loss: float = field(0.0, "weight of the communication-level loss (V2 eq. 29)", at_least=0)
  device_groups: int = field(
    0, "groups of experts that the last two losses count as devices; 0: model.moe.num_expert_groups", at_least=0
  )
  router_z_loss: float = field(0.0, "weight of the squared log of the router's normalizer", at_least=0)
  bias_rule: str = field(
    "sign", "how router biases move: sign (V3)", choices=table_keys("training.router_bias", "BIAS_RULES")
  )
  bias_update_rate: float = field(
    0.0, "update rate of the router bias of each expert: its change in a step (V3: bias update speed 0.001)", at_least=0
  )
  bias_update_tokens: int = field(0, "tokens after which the router bias is frozen (V3: 14.3T); 0: never", at_least=0)


@dataclasses.dataclass(frozen=True)
class MTPConfig(Section, path="mtp"):
  weights: tuple[float, ...] = field(
    (0.3,), "weights of the multi-token prediction loss: the initial one, then one after each of `tokens`", at_least=0
  )
  tokens: tuple[int, ...] = field(
    (), "tokens after which the next weight applies (V3: 0.3 to 10T, then 0.1)", at_least=0
  )

  def check(self) -> None:
    if len(self.weights) != len(self.tokens) + 1 or list(self.tokens) != sorted(self.tokens):
      raise ConfigError(
        f"mtp.weights={self.weights} with mtp.tokens={self.tokens}: give one weight more than tokens, which must rise"
      )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Section, path="checkpoint"):
  every: int = field(1000, "steps between checkpoints", at_least=1)
  keep: int = field(2, "number of newest checkpoints that are kept", at_least=1)
  keep_every: int = field(0, "checkpoints at multiples of this step are never deleted; 0: none", at_least=0)


@dataclasses.dataclass(frozen=True)
class EvalConfig(Section, path="eval"):
  every: int = field(1000, "steps between evaluations on the held-out split", at_least=1)
  sequences: int = field(256, "held-out sequences in an evaluation during the run", at_least=1)
  final_sequences: int = field(4096, "held-out sequences in the evaluation that ends the run", at_least=1)


@dataclasses.dataclass(frozen=True)
class LogConfig(Section, path="log"):
  every: int = field(10, "steps between lines of metrics.jsonl", at_least=1)
  tensorboard: bool = field(True, "write TensorBoard files")


@dataclasses.dataclass(frozen=True)
class SampleConfig(Section, path="sample"):
  prompt: str = field("def ", "prompt of the sample at the end of a run")
  max_tokens: int = field(200, "tokens to generate", at_least=1)
  temperature: float = field(0.7, "temperature of sampling; 0: greedy decoding", at_least=0)
  top_k: int = field(0, "sample from the k most likely tokens; 0: all", at_least=0)
  top_p: float = field(
    0.95, "sample from the most likely tokens with this probability together (nucleus sampling)", above=0, at_most=1
  )
  repetition_penalty: float = field(
    1.0, "divides positive and multiplies negative logits of tokens that the text already has", above=0
  )


@dataclasses.dataclass(frozen=True)
class Config(Section):
  name: str = field("run", "name of the experiment; the default run folder is runs/NAME", path_inside="runs/")
  seed: int = field(
    0, "seed of the initial parameters, of dropout and of the data order", at_least=0, at_most=2**32 - 1
  )
  init_from: str = field(
    "", "initial weights of a new run: the folder of a Hugging Face checkpoint, or the workdir of another run"
  )
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  schedule: ScheduleConfig = ScheduleConfig()
  mesh: MeshConfig = MeshConfig()
  parallel: ParallelConfig = ParallelConfig()
  train: TrainConfig = TrainConfig()
  balance: BalanceConfig = BalanceConfig()
  mtp: MTPConfig = MTPConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  eval: EvalConfig = EvalConfig()
  log: LogConfig = LogConfig()
  sample: SampleConfig = SampleConfig()

  def check(self) -> None:
    if (self.model.param_dtype == "float64") != (self.optimizer.moments_dtype == "float64"):
      raise ConfigError(
        f"optimizer.moments_dtype={self.optimizer.moments_dtype} with model.param_dtype={self.model.param_dtype}: "
        "float64 runs are float64 throughout; set both to float64 or neither"
      )
    tokens = TOKENIZER_SIZES.get(self.data.tokenizer, 0)
    if tokens > self.model.vocab:
      raise ConfigError(
        f"data.tokenizer={self.data.tokenizer} has {tokens} ids but model.vocab={self.model.vocab}: raise model.vocab to at least {tokens}"
      )
    if self.data.seq <= self.model.num_mtp_layers:
      raise ConfigError(
        f"data.seq={self.data.seq} leaves no targets for depth {self.model.num_mtp_layers} of multi-token prediction: "
        "raise data.seq above model.num_mtp_layers, or lower that"
      )
    self.check_balance()
    self.check_mesh()

  def check_balance(self) -> None:
    """Raises ConfigError where balance losses and biases do not fit the experts."""
    moe, balance = self.model.moe, self.balance
    if balance.bias_update_rate and not moe.router_bias:
      raise ConfigError(f"balance.bias_update_rate={balance.bias_update_rate} needs model.moe.router_bias=true: set it")
    if moe.router == "hash" and (balance.expert_loss or balance.device_loss or balance.communication_loss):
      raise ConfigError(
        "balance.expert_loss, device_loss and communication_loss have no effect on the choice of model.moe.router=hash, "
        "which token ids make: set them to 0"
      )
    groups = balance.device_groups or moe.num_expert_groups
    if (balance.device_loss or balance.communication_loss) and (moe.num_routed_experts % groups or groups < 2):
      raise ConfigError(
        f"balance.device_loss and communication_loss need at least 2 equal groups of the {moe.num_routed_experts} "
        f"experts, got {groups}: set balance.device_groups or model.moe.num_expert_groups"
      )
    if balance.communication_loss and groups != moe.num_expert_groups:
      raise ConfigError(
        f"balance.communication_loss counts the groups that tokens are sent to, of model.moe.num_expert_groups="
        f"{moe.num_expert_groups}, but balance.device_groups={groups}: set balance.device_groups=0, or balance.communication_loss=0"
      )

  def check_mesh(self) -> None:
    """Raises ConfigError unless every sharded dimension divides over its mesh axes."""
    mesh, attention, moe = self.mesh, self.model.attention, self.model.moe
    for name in ATTENTION_KINDS[attention.kind].head_counts(attention):
      check_divides(f"model.attention.{name}", getattr(attention, name), *axis_product(mesh, *RULES["heads"]))
    check_divides("model.vocab", self.model.vocab, *axis_product(mesh, *RULES["vocab"]))
    if self.model.num_dense_layers:
      check_divides("model.mlp", self.model.mlp, *axis_product(mesh, *RULES["mlp"]))
    if moe.num_routed_experts:
      check_divides("model.moe.mlp", moe.mlp, *axis_product(mesh, *RULES["mlp"]))
      check_divides("model.moe.num_routed_experts", moe.num_routed_experts, *axis_product(mesh, *RULES["experts"]))
    check_weights(self.model, mesh)
    check_divides("data.seq", self.data.seq, *axis_product(mesh, *RULES["stream"]))
    if mesh.context > 1:
      check_divides("data.seq", self.data.seq, "2 x mesh.context", 2 * mesh.context)  # each device has two chunks
      if attention.dropout:
        raise ConfigError(
          f"model.attention.dropout={attention.dropout} with mesh.context={mesh.context}: context parallelism "
          "has no attention dropout; set model.attention.dropout to 0, or mesh.context to 1"
        )
    check_divides(
      "train.microbatch" if self.train.microbatch else "train.global_batch",
      self.train.microbatch or self.train.global_batch,
      *axis_product(mesh, *RULES["batch"]),
    )
    self.check_stages()

  def check_stages(self) -> None:
    """Raises ConfigError unless layers and stages fit each other."""
    stages, virtual_stages, stage_layers = self.mesh.stage, self.parallel.virtual_stages, self.parallel.stage_layers
    layers = self.model.num_moe_layers or self.model.num_dense_layers
    if stages == 1 and (virtual_stages > 1 or stage_layers):
      raise ConfigError("parallel.virtual_stages and parallel.stage_layers are for a pipeline: set mesh.stage above 1")
    if stages > 1 and self.parallel.zero == 2:
      raise ConfigError(
        "parallel.zero=2 with mesh.stage above 1: the pipeline sums gradients of unsharded weights (1) or of shards (3); set 1 or 3"
      )
    if stages > 1 and layers < stages * virtual_stages:
      raise ConfigError(
        f"mesh.stage={stages} x parallel.virtual_stages={virtual_stages} makes {stages * virtual_stages} chunks of {layers} layers "
        "(of an MoE model: of its MoE layers): lower one of them"
      )
    if stages > 1 and stage_layers and (len(stage_layers), sum(stage_layers)) != (stages * virtual_stages, layers):
      raise ConfigError(
        f"parallel.stage_layers={stage_layers} has {len(stage_layers)} chunks and {sum(stage_layers)} layers: give the layers of "
        f"each of the {stages * virtual_stages} chunks (mesh.stage={stages} x parallel.virtual_stages={virtual_stages}), {layers} in all"
      )


def axis_product(mesh: MeshConfig, *names: str) -> tuple[str, int]:
  """(name for errors, product of the sizes) of these mesh axes. Those of size 1, or not yet known, are left out."""
  sizes = {f"mesh.{name}": size for name in names if (size := getattr(mesh, name)) > 1}
  return " x ".join(sizes) or f"mesh.{names[0]}", math.prod(sizes.values())


def check_weights(model: ModelConfig, mesh: MeshConfig) -> None:
  """Raises ConfigError unless the mesh axes that shard the weights divide them evenly."""
  check_divides("model.embed", model.embed, *axis_product(mesh, *RULES["embed"]))
  for name in ATTENTION_KINDS[model.attention.kind].latent_dims:
    check_divides(f"model.attention.{name}", getattr(model.attention, name), *axis_product(mesh, *RULES["latent"]))


def check_divides(path: str, size: int, axis: str, devices: int) -> None:
  """Raises ConfigError unless `size` of the field `path` divides over `devices` of `axis` (-1: not yet known)."""
  if devices > 0 and size % devices:
    step = 2 if axis.startswith("2 x ") else 1
    options = ", ".join(str(n) for n in range(step, min(size, 256) + 1, step) if size % n == 0)
    use = f"{axis} must be one of {options}, or {path}" if options else path
    raise ConfigError(f"{path}={size} does not divide over {axis}={devices}: {use} must be a multiple of {devices}")
