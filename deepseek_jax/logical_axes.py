"""The one table of logical axes: which mesh axes shard a dimension. Config checks and `sharding` read it."""

# Logical axis -> mesh axes that shard it.
RULES: dict[str, tuple[str, ...]] = {
  # Of values that each device has its own of: all axes, in the order of the mesh's devices.
  "devices": ("data", "stage", "fsdp", "expert", "context", "tensor"),
  # Dimensions of activations. `stream` is the sequence between blocks, `seq` the sequence inside them.
  "batch": ("data", "fsdp", "expert"),
  "seq": ("context",),
  "stream": ("context", "tensor"),
  "latent_seq": ("context",),
  # Dimensions of activations and of parameters.
  "vocab": ("tensor",),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "mlp": ("tensor",),
  "head_dim": (),
  "experts": ("expert",),
  "stages": ("stage",),
  # Dimensions of parameters, which stay sharded and are all-gathered for use (`all_gather_params`). `stage` comes last:
  # see `to_stage_params` in parallel/pipeline.py.
  "embed": ("fsdp", "expert", "context", "stage"),
  "latent": ("fsdp", "stage"),
  "expert_embed": ("fsdp", "context", "stage"),
}
FSDP_AXES = ("embed", "latent", "expert_embed")
