"""The rotary embedding that a config.json describes, in any of the places that transformers reads it from."""

import os
from collections.abc import Mapping
from typing import Any

from deepseek_jax.errors import CheckpointError
from deepseek_jax.model_config import YarnConfig

DEFAULT_THETA = 10_000.0


def rope_config(values: Mapping[str, Any], source: str | os.PathLike) -> tuple[float, YarnConfig]:
  """(theta, YaRN) of `values`, the content of config.json `source` with defaults.

  Published: rope_theta and rope_scaling {type}; transformers 5: rope_parameters {rope_type, rope_theta}. Where several
  places give one value, they must agree. Raises CheckpointError where they do not, and for what is not implemented.
  """
  rope = _rope_values(values, source)
  kind, partial = rope["rope_type"], rope.get("partial_rotary_factor", 1)
  if partial != 1 or kind not in ("default", "yarn"):
    raise CheckpointError(
      f"{source}: rotary embeddings of type {kind!r} with partial_rotary_factor={partial} are not supported; "
      "default and yarn are, over the full head width"
    )
  if kind == "default":
    if rope.get("factor", 1) != 1:
      raise CheckpointError(
        f"{source}: factor={rope['factor']} without rope_type or type, so that transformers would not read it: "
        "add type=yarn, or remove factor"
      )
    return rope["rope_theta"], YarnConfig()
  refused = {
    key: rope[key] for key in ("attention_factor", "truncate") if rope.get(key) not in (None, key == "truncate")
  }
  if refused or not rope.get("factor"):
    raise CheckpointError(
      f"{source}: YaRN needs a factor and takes no {refused or 'other way to give it'}: attention_factor follows from "
      "mscale and mscale_all_dim, and the ends of the ramp are integers (truncate)"
    )
  return rope["rope_theta"], YarnConfig(
    factor=rope["factor"],
    original_seq=rope.get("original_max_position_embeddings", values["max_position_embeddings"]),
    beta_fast=rope.get("beta_fast", 32.0),
    beta_slow=rope.get("beta_slow", 1.0),
    mscale=rope.get("mscale", 0.0),
    mscale_all_dim=rope.get("mscale_all_dim", 0.0),
  )


def _rope_values(values: Mapping[str, Any], source: str | os.PathLike) -> dict[str, Any]:
  """{key: value} that transformers uses: of rope_scaling, else of rope_parameters, and then of config.json itself.

  Raises CheckpointError where another place says something else: it would not be read.
  """
  top = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
  places = {name: _flat(values.get(name) or {}, name, source) for name in ("rope_scaling", "rope_parameters")}
  places["config.json itself"] = {key: values[key] for key in top if values.get(key) is not None}
  main = next((name for name in ("rope_scaling", "rope_parameters") if places[name]), "rope_parameters")
  rope = {"rope_type": "default", "rope_theta": DEFAULT_THETA} | places["config.json itself"] | places[main]
  wrong = [
    f"{key} is {value!r} in {place} and {rope.get(key)!r} in {main if key in places[main] else 'the default'}"
    for place, content in places.items()
    for key, value in content.items()
    if rope.get(key) != value
  ]
  if wrong:
    raise CheckpointError(f"{source}: {'; '.join(wrong)}: only one of them can be read; keep the one that was trained")
  return rope


def _flat(content: Mapping[str, Any], name: str, source: str | os.PathLike) -> dict[str, Any]:
  """`content` of the object `name` without nulls, and with `rope_type` for its older name `type`."""
  flat = {key: value for key, value in content.items() if value is not None}
  nested = [key for key, value in flat.items() if isinstance(value, dict)]
  if nested:
    raise CheckpointError(
      f"{source}: {name} has objects ({', '.join(nested)}), which transformers reads only in models with several kinds of "
      f"layers: put their keys into {name} itself"
    )
  if flat.get("type", flat.get("rope_type")) != flat.get("rope_type", flat.get("type")):
    raise CheckpointError(f"{source}: {name} has rope_type={flat['rope_type']!r} and type={flat['type']!r}: remove one")
  if "type" in flat:
    flat["rope_type"] = flat.pop("type")
  return flat
