"""Writes the report of a run:  python -m deepseek_jax.report --workdir=runs/tiny

A run writes WORKDIR/report.html itself at each evaluation and at its end. This program does at any time, also beside a run
that goes on, or after one that was killed. --serve shows the page in a browser instead, and makes it anew while the run
writes; Ctrl-C ends it.
"""

import os

from absl import flags

from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import parse, run_program
from deepseek_jax.storage import RunFolder, is_url
from deepseek_jax.training.metrics import EVENTS, EXPERT_LOADS, GOODPUT, METRICS
from deepseek_jax.training.report import write_report
from deepseek_jax.training.run_records import CONFIG, read_config


def main(argv: list[str]) -> int:
  """Writes the report and prints its path, or serves it. Raises UserError for a folder that holds no run."""
  values = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "folder of the run, or its gs:// or s3:// URL", flag_values=values)
  flags.DEFINE_bool("serve", False, "serve the page, live, instead of writing it", flag_values=values)
  flags.DEFINE_string("host", "127.0.0.1", "with --serve: the address to listen on", flag_values=values)
  flags.DEFINE_integer(
    "port",
    8001,
    "with --serve: the port to listen on; 0: a free one",
    lower_bound=0,
    upper_bound=65535,
    flag_values=values,
  )
  parse(argv, values, __doc__)
  if not values.workdir:
    raise ConfigError("--workdir=DIR says of which run, e.g. --workdir=runs/tiny")
  if values.serve:
    return _serve(values.workdir, values.host, values.port)
  folder = RunFolder(values.workdir)
  folder.download((CONFIG, METRICS, EVENTS, EXPERT_LOADS, GOODPUT))
  write_report(folder.path)
  folder.upload()
  print(os.path.join(values.workdir, "report.html"))
  return 0


def _serve(workdir: str, host: str, port: int) -> int:
  """Serves the report of the run in a local folder until Ctrl-C."""
  from deepseek_jax.training.report_server import ReportServer

  if is_url(workdir):
    raise ConfigError(f"--serve takes a local folder, got {workdir}; without it the report is written to the bucket")
  read_config(os.path.join(workdir, CONFIG))  # a folder that holds no run is an error now
  with ReportServer(workdir, host, port) as server:
    print(f"serving the report of {workdir} at {server.url}; Ctrl-C ends", flush=True)
    try:
      server.serve_forever()
    except KeyboardInterrupt:
      print()
  return 0


if __name__ == "__main__":
  run_program(main)
