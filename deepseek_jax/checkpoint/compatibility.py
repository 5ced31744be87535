"""Whether a run may continue from a checkpoint: the same model, moments and data, whatever else has changed."""

import dataclasses

from deepseek_jax.checkpoint.parts import layout
from deepseek_jax.config import Config
from deepseek_jax.errors import CheckpointError
from deepseek_jax.schema import flatten_config

# These change how a step is computed, not what the saved arrays mean.
_FREE = {
  "model.remat", "model.dropout", "model.attention.dropout", "model.attention.kv_comm", "model.moe.buffer_factor",
  "model.attention.implementation", "model.moe.implementation", "model.fp8.implementation",
}  # fmt: skip
# Nor do these what weights mean that a run starts from.
_FREE_AT_START = {
  "model.init_std", "model.param_dtype", "model.compute_dtype", "model.moe.dispatch", "model.moe.capacity_factor",
  "model.moe.no_drop_fraction", "model.precision", "model.fp8.forward", "model.fp8.dgrad", "model.fp8.wgrad", "model.fp8.pow2_scales",
  "model.fp8.block",
}  # fmt: skip
# The fields of the model that arrays and their shapes depend on.
_SHAPES = {
  "vocab", "embed", "layers", "first_dense_layers", "num_mtp_layers", "mlp", "tied_embeddings", "attention.kind",
  "attention.heads", "attention.kv_heads", "attention.head_dim", "attention.q_lora_rank", "attention.kv_lora_rank",
  "attention.qk_nope_head_dim", "attention.qk_rope_head_dim", "attention.v_head_dim", "moe.num_routed_experts",
  "moe.num_shared_experts", "moe.mlp", "moe.router_bias",
}  # fmt: skip
# These of `data` do not change which tokens a sample has, so they are no reason for another fingerprint.
_NOT_IN_FINGERPRINT = {"data.mask_documents", "data.cache", "data.verify"}


def check_compatible(saved_config, config, saved_fingerprint, fingerprint, accept_data_change=False):
  """Compares a checkpoint's config (nested dict, as JSON gives it) and data fingerprint with those of this run.

  A field that the checkpoint lacks was added later and counts as its default there. Returns the differences that may
  be, [(path, old, new)], `new` being None for a field that only the checkpoint knows. Raises CheckpointError with the
  fields that must agree: all of `model` but how it is computed, optimizer.moments_dtype, and the fingerprint unless
  `accept_data_change`.
  """
  differences = _differences(saved_config, config)
  fatal = [d for d in differences if _must_agree(d[0]) and d[2] is not None]
  if fatal:
    raise CheckpointError(
      f"the checkpoint does not fit this config: {_listing(fatal)}; put these values back, or use another --workdir"
    )
  if saved_fingerprint != fingerprint and not accept_data_change:
    data = [d for d in differences if _orders_data(d[0]) and d[2] is not None]
    raise CheckpointError(
      f"the checkpoint saw other data: its fingerprint is {saved_fingerprint}, now it is {fingerprint} "
      f"({_listing(data) or 'same data.* fields and seed, so the files or the tokenizer changed'}); put the data back, "
      "use another --workdir, or pass --accept_data_change to continue on the new data"
    )
  return differences


def check_fits(directory, model, config):
  """Compares `model`, the ModelConfig of the weights in `directory` from which a run starts, with that of its `config`.

  Returns the differences that may be, as `check_compatible` does: those that change what the model computes. Raises
  CheckpointError with the fields behind it where an array has another shape.
  """
  differences = [d for d in _differences({"model": dataclasses.asdict(model)}, config) if d[0].startswith("model.")]
  if layout(model) != layout(config.model):
    shapes = [d for d in differences if d[0].removeprefix("model.") in _SHAPES]
    raise CheckpointError(
      f"the weights in {directory} do not fit this config: {_listing(shapes)}; take these values from the checkpoint"
    )
  return [d for d in differences if d[0] not in _FREE | _FREE_AT_START and d[0].removeprefix("model.") not in _SHAPES]


def _must_agree(path):
  return path == "optimizer.moments_dtype" or (path.startswith("model.") and path not in _FREE)


def _orders_data(path):
  return path == "seed" or (path.startswith("data.") and path not in _NOT_IN_FINGERPRINT)


def _listing(differences):
  return "; ".join(f"{path}: checkpoint {old}, config {new}" for path, old, new in differences)


def _differences(saved_config, config):
  saved = dict(_leaves(saved_config))
  now, default = (_as_json(flatten_config(c)) for c in (config, Config()))
  known = [(path, saved.get(path, default[path]), now[path]) for path in now]
  unknown = [(path, old, None) for path, old in saved.items() if path not in now]
  return [d for d in known if d[1] != d[2]] + unknown


def _as_json(flat):
  """Tuples as JSON gives them back."""
  return {path: list(value) if isinstance(value, tuple) else value for path, value in flat.items()}


def _leaves(tree, prefix=""):
  """(dotted path, value) of every leaf of nested dicts."""
  for key, value in _as_json(tree).items():
    if isinstance(value, dict):
      yield from _leaves(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value
