"""Writes the report of a run:  python -m deepseek_jax.report --workdir=runs/tiny

A run writes WORKDIR/report.html itself at each evaluation and at its end. This program does at any time, also beside a run
that goes on, or after one that was killed.
"""

import os

from absl import flags

from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import parse, run_program
from deepseek_jax.storage import RunFolder
from deepseek_jax.training.metrics import EVENTS, EXPERT_LOADS, METRICS
from deepseek_jax.training.report import write_report


def main(argv: list[str]) -> int:
  """Writes the report and prints its path. Raises UserError for a folder that holds no run."""
  values = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "folder of the run, or its gs:// or s3:// URL", flag_values=values)
  parse(argv, values, __doc__)
  if not values.workdir:
    raise ConfigError("--workdir=DIR says of which run, e.g. --workdir=runs/tiny")
  folder = RunFolder(values.workdir)
  folder.download(("config.json", METRICS, EVENTS, EXPERT_LOADS))
  write_report(folder.path)
  folder.upload()
  print(os.path.join(values.workdir, "report.html"))
  return 0


if __name__ == "__main__":
  run_program(main)
