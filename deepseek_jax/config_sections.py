"""The sections of a `Config` but the model's, each with its defaults, limits and the checks of its own fields."""

import dataclasses
from typing import Any

from deepseek_jax.errors import ConfigError
from deepseek_jax.schema import Section, config_leaves, field, table_keys

# Number of ids that a tokenizer may emit, known without installing it. byte: 256 bytes and the separator.
TOKENIZER_SIZES = {"byte": 257, "deepseek-llm": 100_015, "deepseek-v3": 128_815}


@dataclasses.dataclass(frozen=True)
class DataConfig(Section, path="data"):
  sources: tuple[str, ...] = field(
    ("python-stdlib",),
    "what to train on: python-stdlib, key-value-retrieval, or files, folders and globs, also at gs:// or s3://, of .txt .py .md .jsonl[.gz|.zst] .parquet",
  )
  weights: tuple[float, ...] = field(
    (), "fraction of samples from each source; empty: in proportion to their size", above=0
  )
  tokenizer: str = field(
    "byte",
    "byte, deepseek-llm, deepseek-v3, the path of a tokenizer.json, or none: a converted checkpoint that came without one",
  )
  seq: int = field(256, "tokens a sequence predicts", at_least=2)
  heldout_fraction: float = field(0.02, "fraction of documents held out for evaluation", above=0, below=1)
  mask_documents: bool = field(False, "attend within documents only; off in the DeepSeek recipes up to V3")
  text_field: str = field("text", "key of the text in .jsonl and .parquet records")
  skip_null: bool = field(False, "skip records whose text is null, and count them; off: such a record is an error")
  order: str = field(
    "shuffled",
    "order of the samples of each source: shuffled, or by_length: those with the shortest documents first",
    choices=("shuffled", "by_length"),
  )
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
  start_step: int = field(0, "step of the run at which the schedule starts; its steps count from there", at_least=0)
  start_tokens: int = field(
    0, "tokens of the run at which the schedule starts; its tokens count from there", at_least=0
  )
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
  steps: int = field(
    1000, "updates after which the run is finished; 0: as many as `stages` take, which need it", at_least=0
  )
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
  sdc_every: int = field(
    0, "steps between checks for silent data corruption: one microbatch is computed twice and compared bitwise; 0: none",
    at_least=0,
  )  # fmt: skip
  sdc_rotate: bool = field(
    False,
    "the second time, each device computes the sequences of another: finds a fault that repeats as well; for meshes of data and fsdp",
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
    if self.sdc_rotate and not self.sdc_every:
      raise ConfigError("train.sdc_rotate says how train.sdc_every checks: set both, or neither")


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
    "sign", "the rule by which router biases move after each update",
    choices=table_keys("training.router_bias", "BIAS_RULES"),
  )  # fmt: skip
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
  minutes: float = field(
    0.0,
    "minutes after the last checkpoint, or the start, at which one is saved between those of `every`; 0: none",
    at_least=0,
  )
  keep: int = field(2, "number of newest checkpoints that are kept", at_least=1)
  keep_every: int = field(0, "checkpoints at multiples of this step are never deleted; 0: none", at_least=0)
  cloud_notices: str = field(
    "auto",
    "save and end when Google Cloud's metadata server announces preemption or host maintenance; auto: on a machine of Google Cloud",
    choices=("auto", "on", "off"),
  )


@dataclasses.dataclass(frozen=True)
class EvalConfig(Section, path="eval"):
  every: int = field(1000, "steps between evaluations on the held-out split", at_least=1)
  sequences: int = field(256, "held-out sequences in an evaluation during the run", at_least=1)
  final_sequences: int = field(4096, "held-out sequences in the evaluation that ends the run", at_least=1)


@dataclasses.dataclass(frozen=True)
class LogConfig(Section, path="log"):
  every: int = field(10, "steps between lines of metrics.jsonl", at_least=1)
  tensorboard: bool = field(True, "write TensorBoard files")
  layer_rms: bool = field(
    True, "log the root mean square of each layer's output and of its gradients, for the report's health section"
  )


@dataclasses.dataclass(frozen=True)
class WatchdogConfig(Section, path="watchdog"):
  step_seconds: float = field(
    120.0, "a hang: no step has finished for so long, and for 10 times the median step; 0: no watchdog", at_least=0
  )
  start_seconds: float = field(3600.0, "so long for devices, the self-test, and all else around steps", above=0)
  data_seconds: float = field(86_400.0, "so long to open the data, which may be packed first", above=0)
  compile_seconds: float = field(
    3600.0, "so long to compile the step, for each of the first steps, and for a check of the devices", above=0
  )
  restore_seconds: float = field(3600.0, "so long to restore a checkpoint or given weights", above=0)
  eval_seconds: float = field(1800.0, "so long for a batch of an evaluation, or for the sample", above=0)
  checkpoint_seconds: float = field(1800.0, "so long for the blocking part of a save, or for its end", above=0)


@dataclasses.dataclass(frozen=True)
class SampleConfig(Section, path="sample"):
  prompt: str = field("def ", "prompt of the sample at the end of a run")
  max_tokens: int = field(200, "tokens to generate; 0: a run ends without a sample", at_least=0)
  temperature: float = field(0.7, "temperature of sampling; 0: greedy decoding", at_least=0, at_most=1e6)
  top_k: int = field(0, "sample from the k most likely tokens; 0: all", at_least=0, at_most=2**31 - 1)
  top_p: float = field(
    0.95,
    "sample from the most likely tokens that together have this probability (nucleus sampling)",
    above=0,
    at_most=1,
  )
  repetition_penalty: float = field(
    1.0,
    "divides positive and multiplies negative logits of tokens that the text already has",
    at_least=1e-38,
    at_most=1e38,
  )


def section_fields(of: str) -> Any:
  """A dataclass field of a stage: nested dicts of the fields of a section that differ in it."""
  doc = f"what differs in the stage of {of}"
  return dataclasses.field(default_factory=dict, hash=False, metadata={"doc": doc})


@dataclasses.dataclass(frozen=True, repr=False)
class StageConfig(Section, path="stages"):
  """A stage of training: its end, and the fields of the config that differ in it, in nested dicts as in a config file."""

  name: str = field("", "name of the stage, for --stage, messages and events")
  until_tokens: int = field(0, "tokens of the whole run at which the stage ends", above=0)
  reset_optimizer: bool = field(False, "start with a new optimizer state")
  model: dict = section_fields("model, but those that arrays depend on: YaRN, RoPE, dropout, how it is computed")
  data: dict = section_fields("data, but the tokenizer: length, sources, their weights, order")
  optimizer: dict = section_fields("optimizer; with another kind or another `trainable` the state has to be reset")
  schedule: dict = section_fields("schedule, which then starts with the stage")
  mesh: dict = section_fields("mesh")
  parallel: dict = section_fields("parallel")
  train: dict = section_fields("train, but `steps`: batch and its ramp, loss")
  balance: dict = section_fields("balance")
  mtp: dict = section_fields("mtp")
  eval: dict = section_fields("eval")

  def check(self) -> None:
    if not self.name.isprintable() or not self.name or set(self.name) & set(" ./=,"):
      raise ConfigError(f"stages.name must be a word without . / = and commas, got {self.name!r}")

  def __repr__(self) -> str:
    given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name)}
    return f"StageConfig({', '.join(f'{name}={value!r}' for name, value in given.items())})"

  def overrides(self) -> dict[str, Any]:
    """The fields that differ: {dotted path: value}."""
    sections = {name: value for name, value in vars(self).items() if isinstance(value, dict) and value}
    return dict(config_leaves(sections))
