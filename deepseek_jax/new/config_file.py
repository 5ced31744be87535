"""A config as a file: Python with reasons in comments, as the shipped configs are, or JSON."""

import json
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.errors import ConfigError
from deepseek_jax.json_schema import config_schema
from deepseek_jax.schema import flatten_config, with_leaves

WIDTH, SHORT = 120, 80  # of a line, and of a section that is written in one
SCHEMA_FILE = "config.schema.json"  # beside a JSON config, which names it
# Written also where they have their defaults: what a reader looks for.
ALWAYS = ("name", "data.sources", "train.steps")
STEPS_FIELDS = ("train.steps", "schedule.steps")  # equal: one constant in Python


def changed_fields(config: Config) -> dict[str, Any]:
  """{path: value} of the fields that differ from the defaults, and of ALWAYS."""
  defaults = flatten_config(Config())
  return {path: value for path, value in flatten_config(config).items() if value != defaults[path] or path in ALWAYS}


def format_json(config: Config) -> str:
  """The fields that differ from the defaults, as JSON that names its schema."""
  tree = {"$schema": f"./{SCHEMA_FILE}", **with_leaves({}, changed_fields(config))}
  return json.dumps(tree, indent=2) + "\n"


def format_python(config: Config, title: str, header: Sequence[str], reasons: Mapping[str, str]) -> str:
  """A config file with a reason at each value, as `ruff format` would leave it with lines of up to WIDTH.

  Args:
    title: the first line of the docstring. header: its other lines, each wrapped by itself; "" for an empty line.
    reasons: {field or section: why}. Raises LookupError where a field has none.
  """
  fields = changed_fields(config)
  has_steps = fields["train.steps"] == fields.get("schedule.steps")
  lines = [f'"""{_in_docstring(title)}', ""]
  for line in header:
    wrapped = textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    lines += [_in_docstring(part) for part in wrapped] or [""]
  lines += ['"""', "", "from ml_collections import ConfigDict", ""]
  if has_steps:
    lines += [*_commented(f"STEPS = {format_value(config.train.steps)}", reasons["train.steps"], ""), ""]
  lines += ["", "def get_config():", "  return ConfigDict(", "    dict("]
  lines += _section(with_leaves({}, fields), "", reasons, has_steps)
  return "\n".join([*lines, "    )", "  )", ""])


def _section(tree: Mapping[str, Any], path: str, reasons: Mapping[str, str], has_steps: bool) -> Iterator[str]:
  indent = " " * (6 + 2 * path.count(".") + 2 * bool(path))
  for name, value in tree.items():
    here = f"{path}.{name}" if path else name
    if isinstance(value, dict) and (line := _one_line(name, value, here, reasons)):
      yield from _commented(indent + line, reasons[here], indent)
    elif isinstance(value, dict):
      yield from _commented(f"{indent}{name}=dict(", reasons.get(here, ""), indent)
      yield from _section(value, here, reasons, has_steps)
      yield f"{indent}),"
    elif has_steps and here in STEPS_FIELDS:
      yield f"{indent}{name}=STEPS,"
    else:
      yield from _commented(f"{indent}{name}={format_value(value)},", _reason_of(here, reasons), indent)


def _one_line(name: str, fields: Mapping[str, Any], path: str, reasons: Mapping[str, str]) -> str | None:
  """A section in one line; None where it is too long for one, or where its fields have reasons of their own."""
  if any(isinstance(value, dict) or f"{path}.{field}" in reasons for field, value in fields.items()):
    return None
  line = f"{name}=dict({', '.join(f'{field}={format_value(value)}' for field, value in fields.items())}),"
  return line if len(line) <= SHORT and path in reasons else None


def _reason_of(path: str, reasons: Mapping[str, str]) -> str:
  """The reason of a field: its own, or "" where its section has one. Raises LookupError where neither has."""
  if path in reasons or path == "name":
    return reasons.get(path, "")
  if path.rpartition(".")[0] in reasons:
    return ""
  raise LookupError(f"no reason is given for {path}")


def _commented(code: str, reason: str, indent: str) -> Iterator[str]:
  """`code` with the reason at its end, or above it where the line would be too long."""
  if not reason:
    yield code
  elif len(code) + len(reason) + 4 <= WIDTH:
    yield f"{code}  # {reason}"
  else:
    yield from textwrap.wrap(
      f"{reason[:1].upper()}{reason[1:]}.", WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
    )
    yield code


def format_value(value: Any) -> str:
  """A value as Python, as `ruff format` leaves it: double quotes, digits in groups, floats in few digits."""
  if isinstance(value, tuple):
    items = ", ".join(map(format_value, value))
    return f"({items},)" if len(value) == 1 else f"({items})"
  if isinstance(value, str):
    text = repr(value)
    return f'"{text[1:-1]}"' if text[0] == "'" and '"' not in value else text
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return repr(value)
  if isinstance(value, int):
    return f"{value:_}" if abs(value) >= 10_000 else str(value)
  mantissa, _, exponent = repr(value).partition("e")
  if exponent or 0 < abs(value) < 1e-3:
    mantissa, _, exponent = f"{value:.12e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}"
  return mantissa


def _in_docstring(text: str) -> str:
  """`text` inside triple quotes: nothing in it ends them or escapes."""
  return text.replace("\\", "\\\\").replace('"', "'")


def write_file(path: str, text: str) -> None:
  """Writes a file in one step. Raises ConfigError where it cannot be written."""
  try:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
      file.write(text)
    os.replace(file.name, path)
  except OSError as error:
    raise ConfigError(f"--out={path} cannot be written: {error.strerror}") from None


def write_schema(folder: str, overwrite: bool) -> None:
  """Writes SCHEMA_FILE into a folder, unless one is there and is not to be overwritten. Raises ConfigError."""
  path = os.path.join(folder, SCHEMA_FILE)
  if overwrite or not os.path.exists(path):
    write_file(path, json.dumps(config_schema(), indent=2) + "\n")
