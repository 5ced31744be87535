"""A config in a few lines: parameters, FLOPs, tokens, mesh and memory.

Printed by --dry_run and at the start of a run.
"""

import textwrap
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.console import format_bytes
from deepseek_jax.data.pipeline import batch_size
from deepseek_jax.mesh import min_devices
from deepseek_jax.parallel.pipeline import layer_assignment
from deepseek_jax.parallel.schedule import Schedule
from deepseek_jax.plan.flops import count_parameters, training_flops
from deepseek_jax.plan.memory import estimate_memory, uses_fused_attention, with_xla_attention
from deepseek_jax.schema import flatten_config
from deepseek_jax.stages import Stage


def planned_tokens(config: Config, step: int = 0, tokens_seen: int = 0) -> int:
  """Tokens seen by the end of `train.steps` steps, with the batch ramp counted step by step.

  step, tokens_seen: completed steps and their tokens, at whatever length. The steps to go are at `data.seq`.
  """
  train, tokens = config.train, tokens_seen
  while step < train.steps and tokens < train.batch_ramp_tokens:
    tokens, step = tokens + batch_size(train, tokens) * config.data.seq, step + 1
  return tokens + max(train.steps - step, 0) * train.global_batch * config.data.seq


def format_planned_tokens(config: Config, step: int = 0, tokens_seen: int = 0) -> str:
  """The line of `planned_tokens`, with the FLOPs of the steps to go."""
  planned, steps = planned_tokens(config, step, tokens_seen), config.train.steps
  tokens_to_go = planned - tokens_seen
  flops = tokens_to_go * training_flops(config.model, config.data.seq).causal
  to_go = f"; to go: {tokens_to_go:,} in {steps - step:,} steps" if step else ""
  return f"tokens planned   {planned:,} in {steps:,} steps{to_go} ({flops:.3g} FLOPs)"


def format_stage(config: Config, stage: Stage) -> str:
  """The line of a stage of a run of `config`: its place, its steps and tokens, and the fields that differ in it."""
  names = [of_config.name for of_config in config.stages]
  overrides = config.stages[names.index(stage.name)].overrides()
  overrides |= {"reset_optimizer": True} if stage.reset_optimizer else {}
  fields = ", ".join(f"{path}={value!r}" for path, value in overrides.items())
  end_tokens = planned_tokens(stage.config, stage.first_step, stage.first.tokens)  # train.steps may end the run before
  text = (
    f"{stage.name}, {names.index(stage.name) + 1} of {len(names)}: steps {stage.first_step:,} to {stage.config.train.steps:,}, tokens "
    f"{stage.first.tokens:,} to {end_tokens:,}{f', {fields}' if fields else ''}"
  )
  lines = textwrap.wrap(text, 103, break_on_hyphens=False)
  return "stage            " + f"\n{'':17}".join(lines)


def config_summary(config: Config, device_kind: str | None = None) -> str:
  """Parameters, FLOPs, mesh and memory of `config`, whose mesh sizes are resolved, a line each.

  device_kind: of the devices that train. None: not known, and memory is that of TPUs, whose attention is a kernel.
  """
  counts, flops = count_parameters(config.model), training_flops(config.model, config.data.seq)
  is_fused = device_kind is None or uses_fused_attention(config, device_kind)
  memory = estimate_memory(config if is_fused else with_xla_attention(config))
  memory_parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in vars(memory).items())
  devices = min_devices(config.mesh)
  of_tpus = ", as on TPUs" if device_kind is None else ""
  mtp = f", and {counts.mtp:,} for multi-token prediction" if counts.mtp else ""
  mesh = " x ".join(f"{axis}={size}" for axis, size in vars(config.mesh).items())
  return "\n".join(
    (
      f"parameters       {counts.total:,} ({counts.active:,} active, {counts.non_embedding:,} without the embedding){mtp}",
      f"FLOPs per token  {flops.causal:.4g} causal attention, {flops.full:.4g} full attention (forward and backward)",
      f"mesh             {mesh}",
      *_pipeline_lines(config),
      f"memory estimate  {format_bytes(memory.total_bytes)} per device, of {devices:,}{of_tpus} ({memory_parts})",
    )
  )


def _pipeline_lines(config: Config) -> list[str]:
  """Stages, layers of each virtual stage and the bubble, in one line. Empty without pipeline parallelism."""
  stages, virtual_stages, train = config.mesh.stage, config.parallel.virtual_stages, config.train
  if stages == 1:
    return []
  microbatches = train.global_batch // (train.microbatch or train.global_batch)
  layers = config.model.num_moe_layers or config.model.num_dense_layers
  mask = layer_assignment(layers, stages, virtual_stages, config.parallel.stage_layers)[1]
  layer_counts = mask.sum(-1).T.ravel().tolist()  # in the order in which a microbatch passes them
  return [
    f"pipeline         {stages} stages x {virtual_stages} virtual stages of {', '.join(map(str, layer_counts))} layers, "
    f"{microbatches} microbatches: bubble {Schedule(stages, virtual_stages, microbatches).bubble_fraction:.1%}"
  ]


def format_config(config: Config) -> str:
  """Every field of the config, one per line."""
  return "\n".join(f"  {path} = {value!r}" for path, value in flatten_config(config).items())


def format_changed_fields(config: Config) -> str:
  """The fields of `config` that differ from the defaults, one per line below their number."""
  defaults = flatten_config(Config())
  changed = {path: value for path, value in flatten_config(config).items() if value != defaults[path]}
  lines = [f"config           {len(changed)} of {len(defaults)} fields differ from the defaults (all: --print_config)"]
  return "\n".join([*lines, *(f"  {path} = {_short(path, value)}" for path, value in changed.items())])


def format_differences(config: Config, base: Config, base_name: str) -> str:
  """How `config` differs from `base`, which is called `base_name`, in three lines at most."""
  values = flatten_config(base)
  changed = [f"{path}={_short(path, value)}" for path, value in flatten_config(config).items() if value != values[path]]
  text = f"{base_name}{', but ' if changed else ''}{', '.join(changed)}"
  lines = textwrap.wrap(text, 103, break_on_hyphens=False, max_lines=3, placeholder=" ... (all: --print_config)")
  return "config           " + f"\n{'':17}".join(lines)


def _short(path: str, value: Any) -> str:
  """`value` of the field `path` as text; of stages their names, as `format_stage` has a line of each."""
  return repr(tuple(stage.name for stage in value)) if path == "stages" else repr(value)
