"""The JSON Schema of a Config (draft 2020-12), from which editors complete and check a .json config."""

import dataclasses
import typing
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.config_sections import StageConfig
from deepseek_jax.schema import Section

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}
_BOUNDS = {"at_least": "minimum", "at_most": "maximum", "above": "exclusiveMinimum", "below": "exclusiveMaximum"}
# A relative path whose names are not empty and not "." or "..". Python's `$` also matches before a line break at the end,
# which the first group excludes. That names have at most 255 bytes and print is left to from_dict.
_NAME = r"(?!\s*\.{0,2}\s*(?:/|$))[^/]+"
_PATH_PATTERN = rf"^(?![\s\S]*[\x00-\x1f\x7f]){_NAME}(?:/{_NAME})*$"


def config_schema() -> dict[str, Any]:
  """The schema of a config file: types, choices, bounds, defaults and descriptions of every field.

  It is a little stricter than `from_dict`, which also reads the command line's text: numbers, booleans and lists have JSON's
  own types here. What fields must be together (`Section.check`) is not in it.
  """
  schema = section_schema(Config)
  pointer = {"type": "string", "description": "where the schema of this file is; editors read it, programs do not"}
  properties = {"$schema": pointer, **schema["properties"]}
  return {"$schema": DIALECT, "title": "A config of deepseek_jax", **schema, "properties": properties}


def section_schema(cls: type[Section]) -> dict[str, Any]:
  """The schema of one section: an object of fields and sections, and nothing else."""
  kinds = typing.get_type_hints(cls)
  properties = {
    f.name: field_schema(f, kinds[f.name]) if "doc" in f.metadata else section_schema(kinds[f.name])
    for f in dataclasses.fields(cls)
  }
  return {"type": "object", "additionalProperties": False, "properties": properties}


def field_schema(field: dataclasses.Field[Any], kind: Any) -> dict[str, Any]:
  """The schema of a field of type `kind`. Limits are those of its items where it is a tuple."""
  description = {"description": field.metadata["doc"]}
  if kind is dict:  # what differs in a stage from the section of that name
    return description | section_schema(typing.get_type_hints(Config)[field.name])
  if kind == tuple[StageConfig, ...]:
    return description | {"type": "array", "items": section_schema(StageConfig), "default": []}
  is_tuple = typing.get_origin(kind) is tuple
  item: dict[str, Any] = {"type": _TYPES[typing.get_args(kind)[0] if is_tuple else kind]}
  for name, limit in field.metadata.items():
    if name in _BOUNDS:
      item[_BOUNDS[name]] = limit
  if "choices" in field.metadata:
    item["enum"] = list(field.metadata["choices"])
  if "path_inside" in field.metadata:
    item["pattern"] = _PATH_PATTERN
  default: Any = field.default
  return {
    **description,
    **({"type": "array", "items": item} if is_tuple else item),
    "default": list(default) if is_tuple else default,
  }
