"""Times the report of a long run, and a comparison of many runs:  python -m benchmarks.report_time --rows=1e6 --runs=50

Writes made-up runs of the config tiny to a temporary folder, in the format of training, and times the programs whole. A
million rows are 0.9 GB.
"""

import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import flags

from deepseek_jax.console import current_console, format_bytes
from deepseek_jax.flags import load_config, parse, run_program

ROWS_OF_COMPARED = 300
# As a run of tiny logs them, in addition to the loss.
NAMES = (
  "balance_loss", "grad_norm", "learning_rate", "router/layer_1/max_vio", "router/layer_1/entropy",
  "router/layer_1/dead_experts", "router/mtp_1/max_vio", "router/mtp_1/entropy", "router/mtp_1/dead_experts", "max_vio",
  "mtp_loss_1", "mtp_weight", "overflow", "total_loss", "step_seconds", "data_seconds", "eval_seconds",
  "checkpoint_seconds", "tokens_per_second", "model_flops_per_second", "rms/layer_0/activations", "rms/layer_1/activations",
)  # fmt: skip


def main(argv: list[str]) -> int:
  values = flags.FlagValues()
  flags.DEFINE_float("rows", 1e6, "of the long run", lower_bound=1, flag_values=values)
  flags.DEFINE_integer("runs", 50, "to compare", lower_bound=1, flag_values=values)
  parse(argv, values, __doc__)
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    write_run(root / "long", int(values.rows), seed=0)
    for seed in range(values.runs):
      write_run(root / "many" / f"run-{seed}", ROWS_OF_COMPARED, seed)
    for title, arguments, page in (
      (f"report of {int(values.rows):,} rows", ["report", f"--workdir={root / 'long'}"], root / "long" / "report.html"),
      (f"compare of {values.runs} runs", ["compare", str(root / "many"), f"--out={root / 'c.html'}"], root / "c.html"),
    ):  # fmt: skip
      seconds, cpu_seconds = timed([sys.executable, "-m", f"deepseek_jax.{arguments[0]}", *arguments[1:]])
      size = format_bytes(page.stat().st_size)
      current_console().print(f"{title:28s} {seconds:6.2f} s, {cpu_seconds:.2f} s of CPU time, page {size}")
  return 0


def timed(command: list[str]) -> tuple[float, float]:
  """(seconds, seconds of CPU time) of a command that succeeds."""
  before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
  subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": os.getcwd()})
  seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
  return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write_run(folder: pathlib.Path, rows: int, seed: int) -> None:
  """The files of a run of so many logged steps."""
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(dataclasses.asdict(load_config("tiny", {"seed": seed}))))
  draw = np.random.default_rng(seed)
  with open(folder / "metrics.jsonl", "w") as file:
    for start in range(0, rows, 10_000):
      steps = range(start + 1, min(start + 10_000, rows) + 1)
      losses = 2 + 3 / (1 + np.asarray(steps) / 1000) + draw.normal(0, 0.05, len(steps))
      for step, loss, others in zip(
        steps, losses.tolist(), draw.random((len(steps), len(NAMES))).tolist(), strict=True
      ):
        line = {
          "step": step,
          "loss": loss,
          "bits_per_byte": loss * 1.44,
          "tokens": 2048 * step,
          "samples": 8 * step,
          "skipped": 0,
        }
        file.write(json.dumps(line | dict(zip(NAMES, others, strict=True))) + "\n")
  events = [{"event": "start", "step": 0, "time": 0.0}]
  events += [
    {"event": "eval", "step": rows, "time": 1.0, "loss": 2.0 + draw.random(), "bits_per_byte": 2.9, "sequences": 64}
  ]
  (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


if __name__ == "__main__":
  run_program(main)
