"""The command line: `--config=NAME --config.any.field=value` into a checked Config, and errors in one line.

Plain config_flags rejects `1e3` for integers, hides its suggestion under a traceback and shows no fields in --help.
"""

import ast
import dataclasses
import difflib
import gc
import importlib.util
import io
import json
import os
import pathlib
import re
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict

from deepseek_jax.config import Config
from deepseek_jax.config_sections import StageConfig
from deepseek_jax.console import discard_output
from deepseek_jax.cpu_backend import size_thread_pool
from deepseek_jax.errors import ConfigError, Stopped, UserError, format_exception
from deepseek_jax.renamed_fields import with_current_names
from deepseek_jax.schema import (
  KINDS,
  MAX_TYPOS,
  coerce,
  edit_distance,
  flatten_config,
  from_dict,
  leaf_paths,
  unknown_key,
  with_leaves,
)
from deepseek_jax.storage import is_url, read_object


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
  """(arguments without `--config.PATH=VALUE`, {path: text}). A bare boolean field means true.

  Raises ConfigError for an unknown field and for a field without a value.
  """
  rest: list[str] = []
  overrides: dict[str, str] = {}
  leaves = leaf_paths(Config)
  arguments = iter(argv)
  for argument in arguments:
    name, equals, text = argument.lstrip("-").partition("=")
    if not (argument.startswith("-") and name.startswith("config.")):
      rest.append(argument)
      continue
    path = name.removeprefix("config.")
    field = leaves.get(path) or _stage_field(path)
    if field is None:
      raise ConfigError(_unknown_field(path))
    value = text if equals else "true" if field.type is bool else next(arguments, None)
    if value is None:
      raise ConfigError(f"--config.{path} needs a value: --config.{path}=VALUE")
    overrides[path] = value
  return rest, overrides


def _stage_field(path: str) -> dataclasses.Field[Any] | None:
  """The field that stages.NAME.FIELD sets in the stage NAME: one of a stage, or one of the config; None for another path."""
  section, _, rest = path.partition(".")
  name = rest.partition(".")[2]
  leaves = {p.removeprefix("stages."): f for p, f in leaf_paths(StageConfig).items() if f.type is not dict}
  sections = {f.name for f in dataclasses.fields(StageConfig) if f.type is dict}
  in_section = {p: f for p, f in leaf_paths(Config).items() if p.partition(".")[0] in sections}
  return (leaves | in_section).get(name) if section == "stages" else None


def _unknown_field(path: str) -> str:
  """The error for a `path` that is no field, neither of the config nor of a stage; for a stage, it is about what follows its name."""
  name = path.removeprefix("stages.").partition(".")[2]
  if not path.startswith("stages.") or not name:
    return unknown_key(Config, path)
  if name in leaf_paths(Config):
    return f"--config.{path}: no stage can change {name}"
  of_config = "." in name or any(field.startswith(f"{name}.") for field in leaf_paths(Config))
  unknown = unknown_key(Config, name) if of_config else unknown_key(StageConfig, f"stages.{name}")
  return f"--config.{path}: {unknown}"


def _set_stage_fields(tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
  """`tree`, a config, with `overrides` {stages.NAME.FIELD: value or text}. Raises ConfigError for a stage that there is not."""
  stages = [dataclasses.asdict(s) if isinstance(s, StageConfig) else dict(s) for s in tree.get("stages", ())]
  for path, value in overrides.items():
    name, _, leaf = path.removeprefix("stages.").partition(".")
    names, field = [str(stage.get("name")) for stage in stages], _stage_field(path)
    if name in names and field is None:
      raise ConfigError(_unknown_field(path))
    if field is None or name not in names:
      raise ConfigError(
        f"--config.{path}: expected stages.NAME.FIELD, of a stage of the config, which has {', '.join(names) or 'none'}"
      )
    index, kind = names.index(name), typing.cast(type, field.type)
    try:
      stages[index] = with_leaves(stages[index], {leaf: coerce(value, kind)})
    except (TypeError, ValueError, SyntaxError, OverflowError):
      raise ConfigError(f"--config.{path} must be {KINDS[kind]}, got {value!r:.80}") from None
  return {**tree, "stages": stages}


def file_exists(path: str) -> bool:
  """Whether there is a file, or an object of a bucket, at `path`. Raises StorageError where the bucket refuses."""
  return read_object(path) is not None if is_url(path) else os.path.isfile(path)


def shipped_configs() -> dict[str, pathlib.Path]:
  """The shipped configs: name -> file. An installed package has them inside; a checkout has them beside the package."""
  package = pathlib.Path(__file__).parent
  installed = package / "configs"
  folder = installed if installed.is_dir() else package.parent / "configs"
  return {path.stem: path for path in sorted(folder.glob("*.py"))}


def find_config(name: str) -> str:
  """The path of the config that --config names: a .py or .json file, a .json object in a bucket, or a shipped config.

  Names of shipped configs have no suffix, so a file is never mistaken for one. Raises ConfigError where there is none.
  """
  if name.endswith((".py", ".json")) and file_exists(name):
    return name
  shipped = shipped_configs()
  if name in shipped:
    return str(shipped[name])
  if not name.endswith((".py", ".json")) and file_exists(name):
    raise ConfigError(
      f"config file {name!r} must be Python (.py, with a get_config()) or JSON (.json, an object of sections): write it "
      "as one of the two"
    )
  if os.path.isdir(name):
    raise ConfigError(f"--config={name} is a folder: give a file, as {os.path.join(name, 'config.json')} of a run")
  near = difflib.get_close_matches(pathlib.PurePath(name).stem, shipped, 1, 0.6)
  suggestion = f"; did you mean --config={near[0]}?" if near else ""
  other = pathlib.PurePath(name).suffix not in ("", ".py", ".json")
  kind = "; a config file is Python (.py) or JSON (.json)" if other else suggestion
  raise ConfigError(f"no config file {name!r}, and no shipped config of that name: {', '.join(shipped)}{kind}")


def list_configs() -> str:
  """The shipped configs, one a line: name, and the first line of the file's docstring."""
  shipped = shipped_configs()
  width = max(map(len, shipped), default=0)
  lines = []
  for name, path in shipped.items():
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    lines.append(f"  {name:{width}}  {docstring.partition(chr(10))[0]}")
  return "\n".join(lines)


def define_config_flags(flag_values: flags.FlagValues, default: str | None = None) -> None:
  """Defines --config and --list_configs, which `parse` and `load_config` read."""
  flags.DEFINE_string(
    "config", default, "a shipped config (see --list_configs), or a .py or .json file", flag_values=flag_values
  )
  flags.DEFINE_boolean("list_configs", False, "list the shipped configs, and stop", flag_values=flag_values)


def read_config_file(path: str) -> dict[str, Any]:
  """The nested dicts of a config file: what `get_config()` of a .py returns (it is run: trust it), or a .json object.

  A .json may be in a bucket. Raises ConfigError for a file that gives no config, with the line where its code failed.
  """
  try:
    if path.endswith(".json"):
      content = read_object(path) if is_url(path) else pathlib.Path(path).read_bytes()
      tree = json.loads(content or b"")
      if isinstance(tree, dict) and isinstance(tree.get("$schema"), str):
        del tree["$schema"]  # for editors: where the JSON Schema is
      return to_nested_dict(tree, path)
    spec = importlib.util.spec_from_file_location("deepseek_jax_config_file", path)
    assert spec and spec.loader  # a path that ends in .py has both
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
      raise ConfigError(f"{path} defines no function get_config(): write one that returns a ConfigDict of sections")
    return to_nested_dict(module.get_config(), path)
  except UserError:
    raise
  except (Exception, SystemExit) as error:
    # Python that the user wrote may fail in any way; the last frame in their file is what helps.
    lines = [
      f.lineno
      for f in traceback.extract_tb(error.__traceback__)
      if os.path.abspath(f.filename) == os.path.abspath(path)
    ]
    line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
    reason = "it ends the program" if isinstance(error, SystemExit) else format_exception(error)
    raise ConfigError(f"{path}{f':{line}' if line else ''}: {reason}") from None


def to_nested_dict(tree: Any, path: str) -> dict[str, Any]:
  """`tree` as nested dicts. Raises ConfigError unless it is a ConfigDict or a dict."""
  if not isinstance(tree, (ConfigDict, dict)):
    raise ConfigError(f"{path} must give a ConfigDict or a JSON object of config sections, got {tree!r:.60}")
  if "model_type" in tree:
    raise ConfigError(
      f"{path} is the config.json of a Hugging Face model, not of a run: give a run's --config and --workdir, and the folder "
      f"as --config.init_from={os.path.dirname(path) or '.'}"
    )
  if {"dim", "n_layers"} <= set(tree):
    raise ConfigError(
      f"{path} is DeepSeek's ModelArgs: python -m deepseek_jax.checkpoint convert --from_model_args={path} --to=CONFIG.json "
      "makes a config of it"
    )
  return ConfigDict(tree).to_dict()


def load_config(path: str | None = "", overrides: Mapping[str, Any] | None = None, saved: bool = False) -> Config:
  """The Config of a shipped name or a file (none: the defaults) with `overrides` ({dotted path: value or text}) on top.

  saved: a run wrote the file, perhaps with names that fields had in an older version.
  """
  tree = read_config_file(find_config(path)) if path else {}
  if saved:
    tree = with_current_names(tree)
  of_stages = {path: value for path, value in (overrides or {}).items() if path.startswith("stages.")}
  overrides = {path: value for path, value in (overrides or {}).items() if path not in of_stages}
  for dotted, value in overrides.items():
    if isinstance(value, Mapping):
      raise ConfigError(
        f"{dotted} is a section: set its fields by their paths, as {dotted}.{next(iter(value), 'FIELD')}"
      )
  try:
    tree = with_leaves(tree, overrides)
  except ConfigError as error:
    raise ConfigError(f"{path}: {error}") from None
  return from_dict(Config, _set_stage_fields(tree, of_stages) if of_stages else tree)


def write_config(config: Config, folder: str | os.PathLike[str]) -> None:
  """Writes every field to config.json in `folder`, in one step, as `load_config` reads it. Raises OSError."""
  path = os.path.join(folder, "config.json")
  with open(f"{path}.partial", "w", encoding="utf-8") as file:
    json.dump(dataclasses.asdict(config), file, indent=2)
  os.replace(file.name, path)


def config_help(config: Config) -> str:
  """Every field with its value in `config` and its line of doc."""
  leaves, lines = leaf_paths(Config), []
  for path, value in flatten_config(config).items():
    metadata = leaves[path].metadata
    choices = f" [{', '.join(map(str, metadata['choices']))}]" if "choices" in metadata else ""
    lines.append(f"  --config.{path}={value!r}\n      {metadata['doc']}{choices}")
  return "\n".join(lines)


def parse(argv: Sequence[str], flag_values: flags.FlagValues, usage: str | None) -> dict[str, str]:
  """Parses `argv` into `flag_values` and returns the config overrides {path: text}.

  --help and --list_configs are answered here, with exit code 0. Raises ConfigError for an unknown flag, a bad value, and
  an argument that is no flag. A program has its own absl FlagValues, so that several can live in one process (tests,
  notebooks).
  """
  overrides, positional = parse_positional(argv, flag_values, usage)
  if positional:
    raise ConfigError(f"unexpected argument {positional[0]!r}: every argument is --flag=value (see --help)")
  return overrides


def parse_positional(
  argv: Sequence[str], flag_values: flags.FlagValues, usage: str | None
) -> tuple[dict[str, str], list[str]]:
  """As `parse`, for a program that also takes arguments that are no flags: (overrides, these arguments)."""
  help_flags = {"--help", "-help", "-h", "--helpfull"}
  rest, overrides = split_overrides([a for a in argv if a not in help_flags])
  flag_values.set_gnu_getopt()  # flags may follow other arguments
  try:
    positional = flag_values(rest)[1:]
  except flags.UnrecognizedFlagError as error:
    raise ConfigError(unknown_flag(error.flagname, flag_values)) from None
  except flags.Error as error:
    raise ConfigError(describe_flag_error(error, flag_values)) from None
  if overrides and "config" not in flag_values:
    raise ConfigError(f"this program takes no --config.{next(iter(overrides))}; its flags are {', '.join(flag_values)}")
  if help_flags & set(argv):
    print(f"{usage}\n\nFlags:")
    for name in flag_values:
      print(f"  --{name}={flag_values[name].default!r}\n      {flag_values[name].help}")
    if "config" in flag_values:
      print(f"\nConfig fields, with the values of {flag_values.config or 'the defaults'}:")
      print(config_help(load_config(flag_values.config, overrides)))
    sys.exit(0)
  if "list_configs" in flag_values and flag_values.list_configs:
    print(list_configs())
    sys.exit(0)
  return overrides, positional


def unknown_flag(name: str, flag_values: flags.FlagValues) -> str:
  """The error for a flag that is not among `flag_values`: with the nearest one, or the config field of that name."""
  near = min(flag_values, key=lambda flag: edit_distance(flag, name))
  if edit_distance(near, name) <= MAX_TYPOS:
    return f"unknown flag --{name}; did you mean --{near}?"
  fields = [path for path in leaf_paths(Config) if name in (path, path.rpartition(".")[2])]
  if fields and "config" in flag_values:
    return f"unknown flag --{name}; fields of the config are set by their path: --config.{' or --config.'.join(fields)}"
  return f"unknown flag --{name}; the flags are --{', --'.join(flag_values)} (see --help)"


def describe_flag_error(error: flags.Error, flag_values: flags.FlagValues) -> str:
  """absl's error in one line; a value of another type with the type that was expected."""
  text = " ".join(str(error).split())
  match = re.match(r"flag --(\w+)=(.*?): (invalid literal|\('Non-boolean)", text)
  if not match:
    return text
  kind = {"int": "an integer", "bool": "true or false"}[flag_values[match[1]].flag_type()]
  return f"--{match[1]} must be {kind}, got {match[2]!r}"


def write_output(text: str, path: str, flag: str = "json") -> None:
  """`text` to the file that --json, or another `flag`, names, or to stdout for "-". Raises ConfigError where it cannot."""
  if path == "-":
    sys.stdout.write(text)
    return
  try:
    pathlib.Path(path).write_text(text, encoding="utf-8")
  except OSError as error:
    raise ConfigError(f"--{flag}={path} cannot be written: {error.strerror}") from None


def run_program(main: Callable[[list[str]], int]) -> NoReturn:
  """Runs `main(argv)` as a program: a UserError is one line on stderr and exit code 2."""
  size_thread_pool(os.environ)
  # Tracing makes millions of small objects that stay: looking for cycles among them often takes a tenth of a start.
  gc.set_threshold(100_000, 20, 10)
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character must not end a run
  try:
    code = main(sys.argv)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    code = 2
  except Stopped as stop:
    print(stop, file=sys.stderr)
    code = stop.exit_code
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    code = 130
  except BrokenPipeError:  # nobody reads the rest, as after `| head`
    discard_output(sys.stdout)
    code = 128 + signal.SIGPIPE
  sys.exit(code)
