"""Writes a config from a few answers:  python -m deepseek_jax.new

At a terminal it asks: which kind of model, on which hardware, for how many tokens or hours, which text. It takes the size,
the batch and the learning rate from DeepSeek's scaling laws and the mesh from a plan, and writes a config file with the
reason for each value. Every question has a flag:

  python -m deepseek_jax.new --model=moe --topology=v5p:8x8x8 --hours=24 --out=configs/mine.py
  python -m deepseek_jax.new --yes --tokens=2e7 --data='text/*.jsonl' --out=mine.json

Without a terminal, and with --yes, a question without a flag has its default, which is printed. Exit codes: 0, 2 for a user
error, 130 after Ctrl-C; nothing is written then.
"""

import os
import pathlib
import shlex
import sys
from typing import Any

from absl import flags

from deepseek_jax.console import SilentConsole, current_console, log_to_console, set_console
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import parse, run_program
from deepseek_jax.new.config_file import SCHEMA_FILE, format_json, format_python, write_file, write_schema

FLAGS = {
  "model": "dense, as DeepSeek LLM, or moe, as DeepSeek-V3: MLA, experts with router biases, MTP",
  "topology": "hardware: here (this machine), or as plan takes it: v5p:8x8x8, 2*v5p:8x8x8, h100:4x8, h200",
  "tokens": "tokens to train on: 2e9, 500M; the size of the model follows. Or --hours",
  "hours": "hours to train on --topology; tokens and the size of the model follow. Or --tokens",
  "data": "text: files, folders and globs with commas between, also gs:// and s3://; none: not yet",
  "tokenizer": "byte, deepseek-llm, deepseek-v3, or the path of a tokenizer.json",
  "seq": "tokens of a sequence",
  "name": "name of the experiment; the default run folder is runs/NAME",
}


def main(argv: list[str]) -> int:
  """Asks, and writes a config. Raises UserError for user errors."""
  values = flags.FlagValues()
  for name, doc in FLAGS.items():
    flags.DEFINE_string(name, None, doc, flag_values=values)
  flags.DEFINE_string(
    "out", None, "the file: .py, with reasons in comments, or .json (default: NAME.py)", flag_values=values
  )
  flags.DEFINE_boolean("overwrite", False, "replace the file if it is there", flag_values=values)
  flags.DEFINE_boolean("yes", False, "ask nothing: take the defaults of what no flag answers", flag_values=values)
  parse(argv, values, __doc__)
  if values.tokens is not None and values.hours is not None:
    raise ConfigError("--tokens and --hours exclude each other: the size of the model follows from one of them")
  if values.out is not None:
    check_out(values.out, values.overwrite)
  if (values.topology or "").lower() not in ("", "here"):
    os.environ["JAX_PLATFORMS"] = "cpu"  # a plan uses no accelerator

  # Imported late: --help and flag errors need no jax.
  from deepseek_jax.new.questions import Interview

  given = {
    "length" if name in ("tokens", "hours") else name: (name, text)
    for name in FLAGS
    if (text := values[name].value) is not None
  }
  is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
  interview = Interview(
    given, is_terminal and not values.yes, lambda name: check_name(name, values.out, values.overwrite)
  )
  defaults = {"name": pathlib.PurePath(values.out).stem} if values.out else {}
  advice = ask_and_advise(interview, defaults)
  path = values.out or default_path(advice.answers.name)
  write(advice, path, values.overwrite)
  show(advice, path)
  return 0


def check_out(path: str, overwrite: bool) -> None:
  """Raises ConfigError where a config cannot be written to `path`."""
  if not path.endswith((".py", ".json")):
    raise ConfigError(f"--out={path} must end in .py or .json: a config file is Python or JSON")
  if os.path.basename(path) == SCHEMA_FILE:
    raise ConfigError(f"--out={path} is the name of the schema that is written beside a JSON config: give another name")
  if os.path.exists(path) and not overwrite:
    raise ConfigError(f"--out={path} is there already: give --overwrite to replace it, or another name")


def check_name(name: str, out: str | None, overwrite: bool) -> None:
  """Raises ConfigError where the file of that name is there already."""
  path = default_path(name)
  if not out and os.path.exists(path) and not overwrite:
    raise ConfigError(f"{path} is there already: give --overwrite to replace it, --out=FILE, or another name")


def default_path(name: str) -> str:
  """The file of a config of that name."""
  return f"{pathlib.PurePath(name).name}.py"


def ask_and_advise(interview: Any, defaults: dict[str, str]) -> Any:
  """The advice for the answers. At a terminal it asks again where no config fits them. Raises ConfigError."""
  while True:
    answers = interview.ask(**defaults)
    current_console().print(f"\nplanning     for {answers.topology.description}")
    from deepseek_jax.new.advice import advise  # takes seconds: the first question is there at once

    try:
      with set_console(SilentConsole()), log_to_console():  # which kernel a plan counts with is the plan's
        return advise(answers)
    except ConfigError as error:
      if not interview.can_ask_again:
        raise
      current_console().print(f"  {error}\n\nOther answers, please; an empty line leaves one as it was.")


def write(advice: Any, path: str, overwrite: bool) -> None:
  """Writes the config, and beside JSON its schema. Raises ConfigError where it cannot."""
  from deepseek_jax.new.reasons import reasons
  from deepseek_jax.new.summary import header, title

  if path.endswith(".json"):
    write_schema(os.path.dirname(path), overwrite)
    write_file(path, format_json(advice.config))
  else:
    write_file(path, format_python(advice.config, title(advice), header(advice), reasons(advice)))


def show(advice: Any, path: str) -> None:
  """Prints the numbers of the config and the next commands."""
  from deepseek_jax.new.summary import notes, summary

  lines = [f"{name:12} {text}" for name, text in summary(advice).items()]
  lines += [f"note         {note}" for note in notes(advice)]
  command = f"python -m deepseek_jax.train --config={shlex.quote(path)}"
  devices = advice.answers.topology.num_devices
  workdir = shlex.quote(os.path.join("runs", advice.config.name))
  lines += [
    f"wrote        {path}", "", "next",
    f"  {command} --dry_run" + (f" --devices={devices}" if devices > 1 else ""),
    f"  {command} --workdir={workdir}",
  ]  # fmt: skip
  current_console().print("\n".join(lines))


if __name__ == "__main__":
  run_program(main)
