"""Whether a run may resume from a checkpoint, or start from its weights: which config fields must be equal."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.checkpoint.tree import TreePath, flatten_tree, list_first
from deepseek_jax.config import Config
from deepseek_jax.config_sections import MeshConfig
from deepseek_jax.errors import CheckpointError
from deepseek_jax.model_config import SHAPE_FIELDS, ModelConfig
from deepseek_jax.optimizers.trainable import split_trainable
from deepseek_jax.plan.flops import abstract_params
from deepseek_jax.schema import config_leaves, flatten_config

Difference = tuple[str, Any, Any]  # (dotted path of the field, value in the checkpoint, value now)

# Fields of the model that may change on resume: they change how a step is computed, not what the saved arrays mean.
_MAY_CHANGE = {
  "model.remat", "model.dropout", "model.attention.dropout", "model.attention.kv_comm", "model.moe.buffer_factor",
  "model.attention.implementation", "model.moe.implementation", "model.fp8.implementation",
}  # fmt: skip
# Fields of the model that may also differ from those of a checkpoint whose weights start a new run.
_MAY_CHANGE_AT_START = {
  "model.init_std", "model.param_dtype", "model.compute_dtype", "model.moe.dispatch", "model.moe.capacity_factor",
  "model.moe.no_drop_fraction", "model.precision", "model.fp8.forward", "model.fp8.dgrad", "model.fp8.wgrad", "model.fp8.pow2_scales",
  "model.fp8.block",
}  # fmt: skip
_UNORDERED = {"optimizer.trainable"}  # lists of which neither the order nor duplicates matter
# Fields of `data` that the compared fingerprints do not depend on: they do not change which tokens a sample has, but for
# data.seq, at whose saved value both are taken.
_NOT_IN_FINGERPRINT = {"data.mask_documents", "data.cache", "data.verify", "data.seq"}


def check_compatible(
  saved_config: Mapping[str, Any],
  config: Config,
  saved_fingerprint: str,
  fingerprint: str,
  accept_data_change: bool = False,
) -> list[Difference]:
  """Compares a checkpoint's config (nested dict, as JSON gives it) and data fingerprint with those of this run.

  `fingerprint` is of this run's data at the checkpoint's `data.seq`, which may change: a run goes on with the sample of
  the same index, in the order of the windows of the new length, and with the tokens seen so far.

  Returns the differences that are allowed. A field that the checkpoint lacks was added later: there it has its default.
  For a field that only the checkpoint has, the value now is None.

  Raises CheckpointError that lists what must be equal and is not: all of `model` except how it is computed,
  optimizer.kind and moments_dtype, the parameters that optimizer.trainable selects, and the fingerprint unless
  `accept_data_change`.
  """
  differences = _differences(saved_config, config)
  incompatible = [d for d in differences if _must_be_equal(d[0]) and d[2] is not None]
  if incompatible:
    raise CheckpointError(
      f"the checkpoint does not fit this config: {_format(incompatible)}; put these values back, or use another --workdir"
    )
  if any(path == "optimizer.trainable" for path, *_ in differences):
    _check_same_trainable(saved_value(saved_config, "optimizer.trainable"), config)
  if saved_fingerprint != fingerprint and not accept_data_change:
    data = [d for d in differences if _in_fingerprint(d[0]) and d[2] is not None]
    raise CheckpointError(
      f"the checkpoint was trained on other data: its fingerprint is {saved_fingerprint}, now it is {fingerprint} "
      f"({_format(data) or 'same data.* fields and seed, so the files or the tokenizer changed'}); put the data back, "
      "use another --workdir, or pass --accept_data_change to continue on the new data"
    )
  return differences


def saved_value(saved_config: Mapping[str, Any], path: str) -> Any:
  """The value of the field at the dotted `path` in a checkpoint's config; its default where the checkpoint lacks it."""
  saved = _as_json(dict(config_leaves(saved_config)))
  return saved[path] if path in saved else flatten_config(Config())[path]


def array_shapes(model: ModelConfig) -> dict[TreePath, tuple[int, ...]]:
  """{path in a checkpoint: shape} of the model's parameters and buffers, as the model itself makes them."""
  params, buffers = abstract_params(model, MeshConfig(data=1))
  return {path: leaf.shape for path, leaf in flatten_tree({"params": params, "buffers": buffers}).items()}


def check_weights_fit(directory: str | os.PathLike, model: ModelConfig, config: Config) -> list[Difference]:
  """Compares `model`, the config of the weights in `directory` from which a run starts, with the model of its `config`.

  Returns the differences that change what the model computes. Raises CheckpointError where the shape of an array
  differs, with the fields that cause it.
  """
  differences = [d for d in _differences({"model": dataclasses.asdict(model)}, config) if d[0].startswith("model.")]
  if array_shapes(model) != array_shapes(config.model):
    shapes = [d for d in differences if d[0].removeprefix("model.") in SHAPE_FIELDS]
    raise CheckpointError(
      f"the weights in {directory} do not fit this config: {_format(shapes or differences)}; take these values from the checkpoint"
    )
  ignored = _MAY_CHANGE | _MAY_CHANGE_AT_START
  return [d for d in differences if d[0] not in ignored and d[0].removeprefix("model.") not in SHAPE_FIELDS]


def _must_be_equal(path: str) -> bool:
  return path in ("optimizer.kind", "optimizer.moments_dtype") or (
    path.startswith("model.") and path not in _MAY_CHANGE
  )


def _check_same_trainable(saved_patterns: Sequence[str], config: Config) -> None:
  """Raises CheckpointError where the config trains other parameters than those that `saved_patterns` select.

  The optimizer state would not fit: it is of the trainable parameters. Other patterns may select the same ones.
  """
  patterns = config.optimizer.trainable
  params, _ = abstract_params(config.model, MeshConfig(data=1))
  saved, now = (set(flatten_tree(split_trainable(params, p)[0])) for p in (saved_patterns, patterns))
  changes = {"frozen so far, to be trained": now - saved, "trained so far, to be frozen": saved - now}
  listed = [f"{change}: {list_first(sorted(map('/'.join, paths)))}" for change, paths in changes.items() if paths]
  if listed:
    raise CheckpointError(
      f"the checkpoint's optimizer state does not fit: optimizer.trainable: checkpoint {list(saved_patterns)}, config "
      f"{list(patterns)} ({'. '.join(listed)}); put the patterns back, or start from these weights with init_from and "
      "another --workdir"
    )


def _in_fingerprint(path: str) -> bool:
  return path == "seed" or (path.startswith("data.") and path not in _NOT_IN_FINGERPRINT)


def _format(differences: Sequence[Difference]) -> str:
  return "; ".join(f"{path}: checkpoint {old}, config {new}" for path, old, new in differences)


def _differences(saved_config: Mapping[str, Any], config: Config) -> list[Difference]:
  saved = _as_json(dict(config_leaves(saved_config)))
  now, default = _as_json(flatten_config(config)), _as_json(flatten_config(Config()))
  differences: list[Difference] = []
  for path, value in now.items():
    saved_value = saved.get(path, default[path])
    if saved_value != value and not (path in _UNORDERED and set(saved_value) == set(value)):
      differences.append((path, saved_value, value))
  return differences + [(path, value, None) for path, value in saved.items() if path not in now]


def _as_json(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Tuples become lists, as JSON gives them back."""
  return {path: list(value) if isinstance(value, tuple) else value for path, value in flat.items()}
