"""Scaling-law experiments:  python -m deepseek_jax.scaling COMMAND --flag=value ...

  plan      the runs of a sweep, their cost, or the size to train for given tokens or hours
  run       trains the runs of a plan; resumable, in parts, several at once
  table     the results of a sweep as CSV
  fit       scaling laws of a table of runs, ours or other people's, with intervals and a held-out prediction
  hparams   power laws of learning rate and batch size
  report    one HTML page about a table

COMMAND --help shows the flags of a command, with an example. Exit codes: 0, 2 for a user error; run: also 1 if a run failed,
130 and 143 as training.
"""

import importlib
import sys

from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import run_program

COMMANDS = {
  "plan": "commands", "run": "commands", "table": "commands",
  "fit": "fit_commands", "hparams": "fit_commands", "report": "fit_commands",
}  # fmt: skip


def main(argv: list[str]) -> int:
  """Runs a command. Raises UserError for user errors."""
  name = argv[1] if len(argv) > 1 else ""
  if name in COMMANDS:
    module = importlib.import_module(f"deepseek_jax.scaling.{COMMANDS[name]}")
    return getattr(module, name)([f"{argv[0]} {name}", *argv[2:]])
  if name in ("--help", "-h", "-help", "help"):
    sys.stdout.write(f"{__doc__}\n")
    return 0
  got = f"got {name!r}" if name else "got none"
  raise ConfigError(f"a command is needed: {', '.join(COMMANDS)}; {got} (see --help)")


if __name__ == "__main__":
  run_program(main)
