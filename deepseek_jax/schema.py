"""Frozen dataclasses as config sections: fields with docs and limits, checked construction, nested dicts in and out."""

import ast
import dataclasses
import difflib
import math
import typing

from deepseek_jax.errors import ConfigError
from deepseek_jax.renamed_fields import RENAMED_FIELDS


def field(default, doc, **limits):
  """A dataclass field with one line of `doc` and `limits`: choices, at_least, at_most, above, below."""
  return dataclasses.field(default=default, metadata={"doc": doc, **limits})


_LIMITS = {
  "at_least": (lambda v, b: v >= b, "at least"),
  "at_most": (lambda v, b: v <= b, "at most"),
  "above": (lambda v, b: v > b, "above"),
  "below": (lambda v, b: v < b, "below"),
  "choices": (lambda v, b: v in b, "one of"),
}


def coerce(value, kind):
  """`value` as `kind`; text is read as the command line gives it (`1e3` is an integer, `a,b` a tuple)."""
  if typing.get_origin(kind) is tuple:
    if isinstance(value, str):
      text = value.strip()
      literal = text[:1] in ("(", "[") and text[-1:] in (")", "]")
      value = ast.literal_eval(text) if literal else [v.strip() for v in text.split(",") if v.strip()]
    if not isinstance(value, (tuple, list)):
      value = (value,)
    return tuple(coerce(v, typing.get_args(kind)[0]) for v in value)
  if kind is bool and isinstance(value, str) and value.lower() in ("true", "false", "1", "0"):
    return value.lower() in ("true", "1")
  if kind in (int, float) and isinstance(value, str):
    value = float(value) if not value.lstrip("+-").replace("_", "").isdigit() else int(value)
  if kind is int and isinstance(value, float) and value.is_integer():
    return int(value)
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if type(value) is not kind:
    raise TypeError
  return value


class Section:
  """Base of the config sections: types and ranges are checked at construction, with the field's full path in errors."""

  path = ""

  def __init_subclass__(cls, path="", **kwargs):
    super().__init_subclass__(**kwargs)
    cls.path = path

  def __post_init__(self):
    kinds = typing.get_type_hints(type(self))
    for f in dataclasses.fields(self):
      value, path = getattr(self, f.name), f"{self.path}.{f.name}".lstrip(".")
      kind = kinds[f.name]
      if dataclasses.is_dataclass(kind):
        if not isinstance(value, kind):
          raise ConfigError(f"{path} must be a {kind.__name__}, got {value!r}")
        continue
      try:
        value = coerce(value, kind)
      except (TypeError, ValueError, SyntaxError, OverflowError):
        name = getattr(kind, "__name__", str(kind)) if typing.get_origin(kind) is None else str(kind)
        raise ConfigError(f"{path} must be {name}, got {value!r}") from None
      for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, float) and not math.isfinite(item):
          raise ConfigError(f"{path} must be finite, got {item}")
        for name, bound in f.metadata.items():
          if name in _LIMITS and not _LIMITS[name][0](item, bound):
            raise ConfigError(f"{path} must be {_LIMITS[name][1]} {bound}, got {item!r}")
      object.__setattr__(self, f.name, value)
    self.check()

  def check(self):
    """Checks that need several fields of this section."""


def from_dict(cls, tree, root=None):
  """A nested mapping (a ConfigDict, or JSON) as `cls`, a section of `root` (default: `cls` is the root itself).

  Raises ConfigError for a value that does not fit its field, and for an unknown key, naming the nearest field.
  """
  kinds, kwargs = typing.get_type_hints(cls), {}
  names = [f.name for f in dataclasses.fields(cls)]
  for key, value in tree.items():
    path = f"{cls.path}.{key}".lstrip(".")
    if key not in names:
      raise ConfigError(unknown_key(root or cls, path))
    if dataclasses.is_dataclass(kinds[key]):
      if not hasattr(value, "items"):
        raise ConfigError(f"{path} is a section with the fields {', '.join(leaf_paths(kinds[key]))}; got {value!r}")
      value = from_dict(kinds[key], value, root or cls)
    kwargs[key] = value
  return cls(**kwargs)


def leaf_paths(cls):
  """Dotted path -> dataclass field of every leaf under `cls`, in order."""
  kinds, leaves = typing.get_type_hints(cls), {}
  for f in dataclasses.fields(cls):
    if dataclasses.is_dataclass(kinds[f.name]):
      leaves.update(leaf_paths(kinds[f.name]))
    else:
      leaves[f"{cls.path}.{f.name}".lstrip(".")] = f
  return leaves


def unknown_key(root, path):
  """One line for a field that does not exist below `root`: its new name if it was renamed, or else the nearest field."""
  if path in RENAMED_FIELDS:
    return f"config field {path!r} is now {RENAMED_FIELDS[path]!r}: use the new name"
  paths = list(leaf_paths(root))
  same_leaf = [p for p in paths if p.rsplit(".", 1)[-1] == path.rsplit(".", 1)[-1]]
  near = difflib.get_close_matches(path, paths, 1, 0.0)
  return f"unknown config field {path!r}; did you mean {(same_leaf or near)[0]!r}? (--help lists all)"


def flatten(config):
  """Dotted path -> value of every leaf."""
  tree, flat = config, {}
  for path in leaf_paths(type(config)):
    value = tree
    for part in path.split("."):
      value = getattr(value, part)
    flat[path] = value
  return flat
