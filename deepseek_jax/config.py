"""Every setting of a run: `Config`, of the sections of `config_sections.py` and `model_config.py`, and the checks across them.

A config file (`configs/*.py`) names only what differs from the defaults. Its ConfigDict becomes a `Config` once, and
each module gets only its own section. Nothing here touches a device.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from deepseek_jax.config_sections import (
  TOKENIZER_SIZES,
  BalanceConfig,
  CheckpointConfig,
  DataConfig,
  EvalConfig,
  LogConfig,
  MeshConfig,
  MTPConfig,
  OptimizerConfig,
  ParallelConfig,
  SampleConfig,
  ScheduleConfig,
  StageConfig,
  TrainConfig,
  WatchdogConfig,
)
from deepseek_jax.errors import ConfigError
from deepseek_jax.logical_axes import RULES
from deepseek_jax.model_config import ATTENTION_KINDS, SHAPE_FIELDS, ModelConfig
from deepseek_jax.schema import Section, field, from_dict, table_argument, with_leaves

# {balance.bias_rule: the routers whose biases it moves}
BIAS_RULE_ROUTERS = table_argument("training.router_bias", "BIAS_RULES", "routers")

# Fields that no stage of training may change: those that arrays depend on, those that tell the splits of the text apart, and
# those that follow from where the stage starts.
FIXED_IN_STAGES = {f"model.{name}" for name in (*SHAPE_FIELDS, "param_dtype")} | {
  "data.tokenizer", "data.heldout_fraction", "data.text_field", "data.skip_null", "data.cache", "train.steps",
  "schedule.start_step", "schedule.start_tokens",
}  # fmt: skip
# Fields that the optimizer state depends on.
OPTIMIZER_STATE_FIELDS = {"optimizer.kind", "optimizer.moments_dtype", "optimizer.trainable"}


@dataclasses.dataclass(frozen=True)
class Config(Section):
  name: str = field("run", "name of the experiment; the default run folder is runs/NAME", path_inside="runs/")
  seed: int = field(
    0, "seed of the initial parameters, of dropout and of the data order", at_least=0, at_most=2**32 - 1
  )
  init_from: str = field(
    "", "initial weights of a new run: the folder of a Hugging Face checkpoint, or the workdir of another run"
  )
  stages: tuple[StageConfig, ...] = field(
    (),
    "stages of training, one after another: of each its name, until_tokens and the fields that differ; empty: one stage",
  )
  first_stage: str = field(
    "",
    "name of the stage with which a run starts that has its weights from init_from; empty: the first. --stage sets it",
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
  watchdog: WatchdogConfig = WatchdogConfig()
  sample: SampleConfig = SampleConfig()

  def at_stage(self, index: int, values: Mapping[str, Any] | None = None) -> "Config":
    """The config of the stage `index`: without stages, and with `values` {dotted path: value}."""
    stage = self.stages[index]
    tree = dataclasses.asdict(self)
    del tree["stages"], tree["first_stage"]
    tree["train"]["steps"] = self.train.steps or 1  # a config with stages may leave it at 0
    try:
      return from_dict(Config, with_leaves(tree, stage.overrides() | dict(values or {})))
    except ConfigError as error:
      raise ConfigError(f"stages[{index}] ({stage.name}): {error}") from None

  def check_training_stages(self) -> None:
    """Raises ConfigError unless the stages fit each other, and each makes a config."""
    names = [stage.name for stage in self.stages]
    if not self.stages and not self.train.steps:
      raise ConfigError("train.steps must be at least 1, got 0, which is for a config with stages")
    if len(set(names)) < len(names):
      raise ConfigError(f"stages must have different names, got {', '.join(names)}")
    if self.first_stage and self.first_stage not in names:
      raise ConfigError(f"there is no stage {self.first_stage!r}: stages has {', '.join(names) or 'none'}")
    if self.first_stage and not self.init_from:
      raise ConfigError(
        f"a run that starts with the stage {self.first_stage} needs the weights of the stage before: give --config.init_from"
      )
    ends = [stage.until_tokens for stage in self.stages]
    if ends != sorted(set(ends)):
      raise ConfigError(f"stages: until_tokens counts from the start of the run, so it must rise, got {ends}")
    state_fields = self.optimizer_state_fields()
    for index, stage in enumerate(self.stages):
      if fixed := FIXED_IN_STAGES & stage.overrides().keys():
        raise ConfigError(f"stages[{index}] ({stage.name}): no stage can change {', '.join(sorted(fixed))}")
      fields = self.at_stage(index).optimizer_state_fields()
      changed = sorted(
        f"{path} from {state_fields[path]!r} to {fields[path]!r}"
        for path in fields
        if fields[path] != state_fields[path]
      )
      if changed and index and not stage.reset_optimizer:
        raise ConfigError(
          f"stages[{index}] ({stage.name}) changes {', '.join(changed)}, and the optimizer state of the stage before does not "
          "fit: set its reset_optimizer=True"
        )
      state_fields = fields

  def optimizer_state_fields(self) -> dict[str, Any]:
    """{path: value} of the fields that the optimizer state depends on."""
    return {path: getattr(self.optimizer, path.partition(".")[2]) for path in OPTIMIZER_STATE_FIELDS}

  def check(self) -> None:
    self.check_training_stages()
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
    served = BIAS_RULE_ROUTERS[balance.bias_rule]
    if moe.num_routed_experts and moe.router_bias and moe.router not in served:
      rules = " or ".join(rule for rule, routers in BIAS_RULE_ROUTERS.items() if moe.router in routers)
      without = "no rule does; set model.moe.router_bias=false and balance.bias_update_rate=0"
      fix = f"set balance.bias_rule={rules}" if rules else without
      raise ConfigError(
        f"balance.bias_rule={balance.bias_rule} moves the biases of model.moe.router={' or '.join(served)}, "
        f"and not those of model.moe.router={moe.router}: {fix}"
      )
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
    mesh, attention = self.mesh, self.model.attention
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
    if self.train.sdc_rotate:
      self.check_rotation()

  def check_rotation(self) -> None:
    """Raises ConfigError where two devices would not compute the same bits for the same sequences."""
    mesh = dataclasses.asdict(self.mesh)
    others = [f"mesh.{name}={size}" for name, size in mesh.items() if size > 1 and name not in ("data", "fsdp")]
    reason = f"{', '.join(others)}: these devices add up activations, in an order that may differ" if others else ""
    if self.model.is_random:
      reason = "dropout or model.moe.dispatch=capacity: random numbers depend on the place in the batch"
    if reason:
      raise ConfigError(
        f"train.sdc_rotate with {reason}; set train.sdc_rotate=false, which computes twice on one device"
      )

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
  attention, moe = model.attention, model.moe
  for name in ATTENTION_KINDS[attention.kind].head_counts(attention):
    check_divides(f"model.attention.{name}", getattr(attention, name), *axis_product(mesh, *RULES["heads"]))
  check_divides("model.vocab", model.vocab, *axis_product(mesh, *RULES["vocab"]))
  if model.num_dense_layers:
    check_divides("model.mlp", model.mlp, *axis_product(mesh, *RULES["mlp"]))
  if moe.num_routed_experts:
    check_divides("model.moe.mlp", moe.mlp, *axis_product(mesh, *RULES["mlp"]))
    check_divides("model.moe.num_routed_experts", moe.num_routed_experts, *axis_product(mesh, *RULES["experts"]))
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
