"""What a config amounts to, in a few lines: for --dry_run and for the banner of a run."""

from deepseek_jax.config import Config, flatten
from deepseek_jax.mesh import AXES
from deepseek_jax.plan.flops import count_parameters, training_flops
from deepseek_jax.plan.memory import estimate_memory

GIB = 2**30


def planned_tokens(config: Config) -> int:
  """Tokens of `train.steps` updates; a linear batch ramp counts half of what it lacks."""
  train, seq = config.train, config.data.seq
  full = train.steps * train.global_batch * seq
  if not train.batch_ramp_tokens:
    return full
  mean_batch = (train.batch_ramp_from + train.global_batch) / 2
  missing = train.batch_ramp_tokens * (train.global_batch / mean_batch - 1)
  return round(full - missing)


def summary(config: Config, mesh_sizes) -> str:
  """Parameters, FLOPs, tokens and memory of `config` on a mesh of `mesh_sizes` (data, fsdp, expert, tensor)."""
  counts, flops = count_parameters(config.model), training_flops(config.model, config.data.seq)
  tokens, memory = planned_tokens(config), estimate_memory(config, mesh_sizes)
  parts = ", ".join(f"{name} {getattr(memory, name) / GIB:.2f}" for name in vars(memory))
  mesh = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, mesh_sizes, strict=True))
  return "\n".join(
    (
      f"parameters       {counts.total:,} ({counts.active:,} active, {counts.non_embedding:,} without the embedding)",
      f"FLOPs per token  {flops.causal:.4g} causal attention, {flops.full:.4g} full attention (forward and backward)",
      f"tokens planned   {tokens:,} in {config.train.steps:,} steps ({tokens * flops.causal:.3g} FLOPs)",
      f"mesh             {mesh}",
      f"memory estimate  {memory.total / GIB:.2f} GiB a device ({parts})",
    )
  )


def resolved(config: Config) -> str:
  """Every leaf of the config, one a line."""
  return "\n".join(f"  {path} = {value!r}" for path, value in flatten(config).items())
