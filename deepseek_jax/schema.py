"""Frozen dataclasses as config sections: fields with docs and limits, checked construction, nested dicts in and out."""

import ast
import copy
import dataclasses
import difflib
import math
import pathlib
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, get_args

from deepseek_jax.errors import ConfigError
from deepseek_jax.renamed_fields import RENAMED_FIELDS

SectionT = TypeVar("SectionT", bound="Section")
MAX_TYPOS = 2  # in a name that errors correct


def field(default: Any, doc: str, **limits: Any) -> Any:
  """A dataclass field with one line of `doc` and `limits`: choices, at_least, at_most, above, below, path_inside."""
  return dataclasses.field(default=default, metadata={"doc": doc, **limits})


def table_keys(module: str, table: str) -> list[str]:
  """The keys of `table`, a dict that `module`, as "model.router", defines by a display with strings as keys.

  They are read from the source: what a config may say is written once, beside the implementations, and checking it
  imports neither them nor jax. A row that is added while a process runs is appended to this list (`variants`).
  """
  return [ast.literal_eval(key) for key in _table_display(module, table).keys]  # type: ignore[arg-type]


def table_argument(module: str, table: str, argument: str) -> dict[str, Any]:
  """{key: value} of the keyword `argument` in each row of `table`, whose rows are calls with a literal there.

  As in `table_keys`, they are read from the source.
  """
  display = _table_display(module, table)
  values = {}
  for key, row in zip(table_keys(module, table), display.values, strict=True):
    given = [keyword.value for keyword in getattr(row, "keywords", ()) if keyword.arg == argument]
    if not given:
      raise LookupError(f"{module}.{table}: the row {key!r} has no keyword {argument}")
    values[key] = ast.literal_eval(given[0])
  return values


def _table_display(module: str, table: str) -> ast.Dict:
  path = pathlib.Path(__file__).parent.joinpath(*module.split(".")).with_suffix(".py")
  for statement in ast.parse(path.read_text(encoding="utf-8")).body:
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    if any(isinstance(target, ast.Name) and target.id == table for target in targets):
      return statement.value  # type: ignore[attr-defined]
  raise LookupError(f"{path} defines no table {table}")


# Name of a limit -> (whether a value is within it, how an error says so).
_LIMITS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
  "at_least": (lambda value, limit: value >= limit, "at least"),
  "at_most": (lambda value, limit: value <= limit, "at most"),
  "above": (lambda value, limit: value > limit, "above"),
  "below": (lambda value, limit: value < limit, "below"),
  "choices": (lambda value, limit: value in limit, "one of"),
  "path_inside": (
    lambda value, folder: _stays_inside(value),
    "a relative path of printable names inside",
  ),
}
# How errors name the types of fields.
KINDS = {
  bool: "true or false",
  int: "an integer",
  float: "a number",
  str: "text",
  tuple[str, ...]: "a list of texts, as a,b",
  tuple[int, ...]: "a list of integers, as 1,2",
  tuple[float, ...]: "a list of numbers, as 0.5,1",
  dict: "a section of fields",
}


def _stays_inside(path: str) -> bool:
  """Whether the relative `path` names something inside the folder that it is joined to, in names that print."""
  names = path.split("/")
  return path.isprintable() and all(name.strip() not in ("", ".", "..") and len(name.encode()) < 256 for name in names)


def coerce(value: Any, kind: Any) -> Any:
  """`value` as the type `kind`. Text is parsed as on the command line: `1e3` is an integer, `a,b` a tuple.

  Raises TypeError, ValueError, SyntaxError or OverflowError for a value that is not of that type, and ConfigError for a
  section of other fields.
  """
  if _is_section(kind) and isinstance(value, Mapping):
    return from_dict(kind, value)
  if kind is dict and isinstance(value, Mapping):
    return copy.deepcopy(dict(value))
  if typing.get_origin(kind) is tuple:
    if isinstance(value, str):
      text = value.strip()
      literal = text[:1] in ("(", "[") and text[-1:] in (")", "]")
      value = ast.literal_eval(text) if literal else [v.strip() for v in text.split(",") if v.strip()]
    if not isinstance(value, (tuple, list)):
      value = (value,)
    return tuple(coerce(v, get_args(kind)[0]) for v in value)
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
  __dataclass_fields__: typing.ClassVar[dict[str, dataclasses.Field[Any]]]  # subclasses are dataclasses

  def __init_subclass__(cls, path: str = "", **kwargs: Any):
    super().__init_subclass__(**kwargs)
    cls.path = path

  def __post_init__(self):
    kinds = typing.get_type_hints(type(self))
    for f in dataclasses.fields(self):
      value, path = getattr(self, f.name), f"{self.path}.{f.name}".lstrip(".")
      kind = kinds[f.name]
      if _is_section(kind):
        if not isinstance(value, kind):
          raise ConfigError(f"{path} must be a {kind.__name__}, got {value!r:.80}")
        continue
      try:
        value = coerce(value, kind)
      except (TypeError, ValueError, SyntaxError, OverflowError):
        expected = KINDS.get(kind) or f"a list of objects with the fields {', '.join(leaf_paths(get_args(kind)[0]))}"
        raise ConfigError(f"{path} must be {expected}, got {value!r:.80}") from None
      for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, float) and not math.isfinite(item):
          raise ConfigError(f"{path} must be finite, got {item}")
        for name, bound in f.metadata.items():
          if name in _LIMITS and not _LIMITS[name][0](item, bound):
            limit = ", ".join(map(str, bound)) if name == "choices" else bound
            raise ConfigError(f"{path} must be {_LIMITS[name][1]} {limit}, got {item!r:.80}")
      object.__setattr__(self, f.name, value)
    self.check()

  def check(self) -> None:
    """Raises ConfigError for values that do not fit each other. For checks that need several fields of this section."""


def _is_section(kind: Any) -> bool:
  return isinstance(kind, type) and issubclass(kind, Section)


def from_dict(cls: type[SectionT], tree: Mapping[str, Any], root: type[Section] | None = None) -> SectionT:
  """A nested mapping (a ConfigDict, or JSON) as `cls`, a section of `root` (default: `cls` is the root itself).

  Raises ConfigError for a value that does not fit its field, and for an unknown key, naming the nearest field.
  """
  kinds = typing.get_type_hints(cls)
  kwargs: dict[str, Any] = {}
  names = [f.name for f in dataclasses.fields(cls)]
  for key, value in tree.items():
    path = f"{cls.path}.{key}".lstrip(".")
    if key not in names:
      raise ConfigError(unknown_key(root or cls, path))
    if _is_section(kinds[key]):
      if not hasattr(value, "items"):
        raise ConfigError(f"{path} is a section with the fields {', '.join(leaf_paths(kinds[key]))}; got {value!r:.80}")
      value = from_dict(kinds[key], value, root or cls)
    kwargs[key] = value
  return cls(**kwargs)


def leaf_paths(cls: type[Section]) -> dict[str, dataclasses.Field[Any]]:
  """{dotted path: dataclass field} of every leaf under `cls`, in order."""
  kinds = typing.get_type_hints(cls)
  leaves: dict[str, dataclasses.Field[Any]] = {}
  for f in dataclasses.fields(cls):
    if _is_section(kinds[f.name]):
      leaves.update(leaf_paths(kinds[f.name]))
    else:
      leaves[f"{cls.path}.{f.name}".lstrip(".")] = f
  return leaves


def unknown_key(root: type[Section], path: str) -> str:
  """The error for a field that `root` does not have: its new name if it was renamed, or else the nearest fields."""
  if path in RENAMED_FIELDS:
    return f"config field {path!r} is now {RENAMED_FIELDS[path]!r}: use the new name"
  if fields := [leaf.removeprefix(f"{path}.") for leaf in leaf_paths(root) if leaf.startswith(f"{path}.")]:
    return f"{path!r} is a section: set one of its fields, {', '.join(fields)}"
  near = nearest_fields(root, path)
  suggestion = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
  return f"unknown config field {path!r:.120}{suggestion} (--help lists all)"


def nearest_fields(root: type[Section], path: str) -> list[str]:
  """The fields of `root`, at most three, that somebody who wrote `path` may have meant; the likeliest first.

  That is the path with at most two typos; else those with the same last name in another section; else the most similar
  path, unless nothing is similar.
  """
  paths = list(leaf_paths(root))
  typos = {p: edit_distance(p, path) for p in paths if abs(len(p) - len(path)) <= MAX_TYPOS}
  if typos and min(typos.values()) <= MAX_TYPOS:
    return [min(typos, key=typos.__getitem__)]
  by_similarity = difflib.get_close_matches(path, paths, len(paths), 0.0)
  same_leaf = [p for p in by_similarity if p.rpartition(".")[2] == path.rpartition(".")[2]]
  return same_leaf[:3] or difflib.get_close_matches(path, paths, 1, 0.6)


def edit_distance(a: str, b: str) -> int:
  """Fewest letters to insert, delete, replace or swap with their neighbor that make `b` of `a`."""
  before: list[int] = []
  last = list(range(len(b) + 1))
  for i in range(1, len(a) + 1):
    row = [i]
    for j in range(1, len(b) + 1):
      row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (a[i - 1] != b[j - 1])))
      if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
        row[-1] = min(row[-1], before[j - 2] + 1)
    before, last = last, row
  return last[-1]


def config_leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  """(dotted path, value) of each leaf of nested dicts, as a config.json has them."""
  for name, value in tree.items():
    if isinstance(value, Mapping) and value:
      yield from config_leaves(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def with_leaves(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
  """A copy of the nested dicts `tree` with `values` {dotted path: value}. Raises ConfigError for a path below a leaf."""
  changed = copy.deepcopy(dict(tree))
  for path, value in values.items():
    *sections, leaf = path.split(".")
    section = changed
    for name in sections:
      section = section.setdefault(name, {})
      if not isinstance(section, dict):
        raise ConfigError(f"{name} must be a section of fields, got {section!r}")
    section[leaf] = value
  return changed


def flatten_config(config: Section) -> dict[str, Any]:
  """{dotted path: value} of every leaf."""
  flat = {}
  for path in leaf_paths(type(config)):
    value: Any = config
    for part in path.split("."):
      value = getattr(value, part)
    flat[path] = value
  return flat
