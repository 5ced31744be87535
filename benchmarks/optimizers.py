"""Optimizers beside each other:  python -m benchmarks.optimizers --workdir=runs/optimizers

Trains configs/tiny.py for --steps steps with each optimizer, at each of its peak learning rates, once per seed: all of
the first seed before the next. A tenth of the steps is warm-up. The same command continues: finished runs are not
repeated, an interrupted one resumes. Other settings need another --workdir. At the end it prints a Markdown table.
"""

import os
import statistics
from collections.abc import Mapping, Sequence

from absl import flags

from benchmarks.ablations import Run, train_run
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import define_config_flags, parse, run_program
from deepseek_jax.optimizers.optimizer import OPTIMIZERS

RATES = {
  "adamw": ("1e-3", "3e-3", "9e-3"),
  "muon": ("3e-3", "9e-3", "2.7e-2"),
}  # around the best of each; others as AdamW
OF_OPTIMIZER = {"adamw": {"optimizer.eps": 1e-8}}  # the default; tiny has that of the AdamW beside Muon (DeepSeek-V4)
# An evaluation of 262,144 tokens: as long as 300 steps warrant.
SETTINGS = {"eval.final_sequences": 1024, "log.tensorboard": False}


def main(argv: list[str]) -> int:
  values = flags.FlagValues()
  define_config_flags(values, "tiny")
  flags.DEFINE_string("workdir", "runs/optimizers", "folder of the runs", flag_values=values)
  flags.DEFINE_integer("steps", 300, "steps of each run", lower_bound=1, flag_values=values)
  flags.DEFINE_integer("seeds", 2, "runs of each optimizer and learning rate", lower_bound=1, flag_values=values)
  flags.DEFINE_list("optimizers", list(OPTIMIZERS), "optimizers to train with", flag_values=values)
  flags.DEFINE_list("rates", [], "peak learning rates; without: three of each optimizer", flag_values=values)
  overrides = parse(argv, values, __doc__)
  if unknown := set(values.optimizers) - set(OPTIMIZERS):
    raise ConfigError(f"--optimizers must be among {', '.join(OPTIMIZERS)}, not {', '.join(sorted(unknown))}")
  runs: dict[tuple[str, str], list[Run]] = {}  # {(optimizer, learning rate): a run per seed}
  for seed in range(values.seeds):
    for kind in values.optimizers:
      for rate in values.rates or RATES.get(kind, RATES["adamw"]):
        fields = {
          **SETTINGS, "train.steps": values.steps, "schedule.steps": values.steps,
          "schedule.warmup_steps": values.steps // 10, "eval.every": values.steps, **overrides, "seed": seed,
          "optimizer.kind": kind, "schedule.peak": rate, **OF_OPTIMIZER.get(kind, {}),
        }  # fmt: skip
        title = f"{kind}, learning rate {rate}, seed {seed}"
        workdir = os.path.join(values.workdir, f"{kind}-{rate}-{seed}")
        runs.setdefault((kind, rate), []).append(train_run(values.config, workdir, fields, title))
  print(results_table(runs))
  return 0


def results_table(runs: Mapping[tuple[str, str], Sequence[Run]]) -> str:
  """A Markdown table, a row for each optimizer and learning rate. `runs`: {(optimizer, rate): a run per seed}."""
  rows = ["| optimizer | peak learning rate | held-out bits per byte, each seed | mean |", "|---|---|---|---|"]
  for (kind, rate), seeds in sorted(runs.items(), key=lambda item: item[0][0]):
    bits = [evaluation["bits_per_byte"] for _, _, evaluation in seeds]
    rows.append(f"| {kind} | {rate} | {', '.join(f'{b:.4f}' for b in bits)} | {statistics.mean(bits):.4f} |")
  return "\n".join(rows)


if __name__ == "__main__":
  run_program(main)
