"""What a config amounts to, in a few lines: for --dry_run and for the banner of a run."""

from deepseek_jax.config import Config
from deepseek_jax.data.pipeline import batch_size
from deepseek_jax.parallel.pipeline import bubble, layer_assignment
from deepseek_jax.plan.flops import count_parameters, training_flops
from deepseek_jax.plan.memory import estimate_memory
from deepseek_jax.schema import flatten

GIB = 2**30


def planned_tokens(config: Config) -> int:
  """Tokens of `train.steps` updates, a batch ramp counted update by update."""
  train, seq, samples, steps = config.train, config.data.seq, 0, 0
  while steps < train.steps and samples * seq < train.batch_ramp_tokens:
    samples, steps = samples + batch_size(train, seq, samples), steps + 1
  return (samples + (train.steps - steps) * train.global_batch) * seq


def summary(config: Config) -> str:
  """Parameters, FLOPs, tokens and memory of `config`, whose mesh sizes are resolved."""
  counts, flops = count_parameters(config.model), training_flops(config.model, config.data.seq)
  tokens, memory = planned_tokens(config), estimate_memory(config)
  parts = ", ".join(f"{name} {getattr(memory, name) / GIB:.2f}" for name in vars(memory))
  ahead = f", and {counts.mtp:,} for multi-token prediction" if counts.mtp else ""
  mesh = " x ".join(f"{axis}={size}" for axis, size in vars(config.mesh).items())
  return "\n".join(
    (
      f"parameters       {counts.total:,} ({counts.active:,} active, {counts.non_embedding:,} without the embedding){ahead}",
      f"FLOPs per token  {flops.causal:.4g} causal attention, {flops.full:.4g} full attention (forward and backward)",
      f"tokens planned   {tokens:,} in {config.train.steps:,} steps ({tokens * flops.causal:.3g} FLOPs)",
      f"mesh             {mesh}",
      *pipeline(config),
      f"memory estimate  {memory.total / GIB:.2f} GiB a device ({parts})",
    )
  )


def pipeline(config: Config) -> list[str]:
  """What a mesh with stages does with the layers, in a line."""
  stages, virtual_stages, train = config.mesh.stage, config.parallel.virtual_stages, config.train
  if stages == 1:
    return []
  microbatches = train.global_batch // (train.microbatch or train.global_batch)
  layers = config.model.num_moe_layers or config.model.num_dense_layers
  given = config.parallel.stage_layers
  counts = (
    layer_assignment(layers, stages, virtual_stages, given)[1].sum(-1).T.ravel().tolist()
  )  # in the order that they run
  share = bubble(stages, virtual_stages, microbatches)
  return [
    f"pipeline         {stages} stages x {virtual_stages} virtual_stages of {', '.join(map(str, counts))} layers, {microbatches} "
    f"microbatches: bubble {share:.1%}"
  ]


def resolved(config: Config) -> str:
  """Every leaf of the config, one a line."""
  return "\n".join(f"  {path} = {value!r}" for path, value in flatten(config).items())
