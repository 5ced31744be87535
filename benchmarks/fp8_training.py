"""Training in FP8 compared with bf16, with controls:  python -m benchmarks.fp8_training --workdir=runs/fp8_training

Trains the config of this file, a byte-level V3, in each of ARMS on the same batches: bf16 and fp8 once per seed, the
controls with seed 0. The same command continues: finished runs are not repeated, an interrupted one resumes. --report
trains nothing and shows the finished runs. The compared losses are the held-out loss at the end and the mean of the
last NUM_LAST steps.

Runs that differ only by rounding diverge, as runs with different seeds do, though less. To measure rounding without
that noise, the final weights of bf16 are also evaluated in the precision of each arm, without training.

At the end it prints tables; --out=FILE.svg writes a plot. The exit code is 1 if the held-out loss of fp8, the mean over
seeds, is more than LIMIT above bf16, or if the control with one scale per matrix is not.
"""

import itertools
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from benchmarks import fp8_controls
from benchmarks.ablations import check_same_settings
from benchmarks.curve import write_svg
from deepseek_jax.checkpoint.compatibility import array_shapes
from deepseek_jax.errors import UserError
from deepseek_jax.flags import define_config_flags, load_config, parse, run_program
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.training import metrics
from deepseek_jax.training.plot import Series

STEPS = 300
NUM_LAST = 30  # steps at the end whose losses are averaged
LIMIT = 0.0025  # relative loss difference, the most that the V3 report (section 3.3) found
BF16, FP8 = {"model.precision": "bf16"}, {"model.precision": "fp8"}
# {name: (overrides of the config, flags of benchmarks/fp8_controls.py)}
ARMS = {
  "bf16": (BF16, ()),
  "fp8": (FP8, ()),
  "fp8, outliers": (FP8, ("--outliers",)),
  "per tensor, outliers": (FP8, ("--outliers", "--per_tensor")),
  "float32": ({**BF16, "model.compute_dtype": "float32"}, ()),  # how far other rounding alone leads
}
ARMS_PER_SEED = ("bf16", "fp8")
# Overrides of a run that changes no weight.
FROZEN = {"train.steps": 1, "schedule.peak": 1e-30, "balance.bias_update_rate": 0.0}
EXPONENTS = (0, 4, 8, 10, 12, 13, 14, 15, 16, 17, 18)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)

Runs = dict[str, dict[int, dict[str, Any]]]  # {arm: {seed: result of `read_run` and "frozen_heldout"}}
Curves = dict[str, list[tuple[int, float]]]  # {name: [(x, error)]}


def get_config() -> ConfigDict:
  return ConfigDict(
    dict(
      name="fp8_training",
      model=dict(
        vocab=272,  # bytes, so that the head, which is not in FP8, is small
        embed=512,
        layers=3,
        first_dense_layers=1,
        mlp=1024,
        init_std=0.02,
        remat="none",
        attention=dict(
          kind="mla", heads=8, q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32
        ),
        moe=dict(
          num_routed_experts=8, num_shared_experts=1, num_experts_per_token=2, mlp=256, score="sigmoid",
          num_expert_groups=4, topk_groups=2, group_score="top2_sum", router_bias=True, norm_topk_prob=True,
          route_scale=1.0,
        ),
      ),
      data=dict(seq=256, heldout_fraction=0.05),
      schedule=dict(kind="warmup_cosine", peak=1e-3, warmup_steps=50, steps=STEPS, factors=(0.1,)),
      balance=dict(bias_update_rate=0.001, expert_loss=1e-4),
      train=dict(steps=STEPS, global_batch=8),
      checkpoint=dict(every=50, keep=1),
      eval=dict(every=STEPS, final_sequences=512),
      log=dict(every=1, tensorboard=False),
      sample=dict(max_tokens=2),
    )
  )  # fmt: skip


def main(argv: list[str]) -> int:
  values = flags.FlagValues()
  define_config_flags(values, "benchmarks/fp8_training.py")
  flags.DEFINE_string("workdir", "runs/fp8_training", "folder of the runs", flag_values=values)
  flags.DEFINE_string("out", None, "SVG file to write", flag_values=values)
  flags.DEFINE_integer("seeds", 3, "runs of bf16 and fp8", lower_bound=1, flag_values=values)
  flags.DEFINE_boolean("controls", True, "also train the controls", flag_values=values)
  flags.DEFINE_boolean("report", False, "train nothing, show the finished runs", flag_values=values)
  overrides = parse(argv, values, __doc__)
  runs: Runs = {}
  arms = ARMS if values.controls else ARMS_PER_SEED
  for seed, name in [*((0, name) for name in arms), *itertools.product(range(1, values.seeds), ARMS_PER_SEED)]:
    workdir = os.path.join(values.workdir, f"{name.replace(', ', '-').replace(' ', '-')}-{seed}")
    fields = {**overrides, "seed": seed, **ARMS[name][0]}
    frozen_fields = {**fields, **FROZEN, "init_from": os.path.join(values.workdir, f"bf16-{seed}")}
    # The weights of bf16 in this precision. In bf16 itself that is the trained run.
    frozen = None if name == "bf16" else train_arm(name, values, f"{workdir}-frozen", frozen_fields)
    run = train_arm(name, values, workdir, fields)
    if run and (frozen or name == "bf16"):
      runs.setdefault(name, {})[seed] = {**run, "frozen_heldout": (frozen or run)["heldout"]}
  model = load_config(values.config, overrides).model
  print(f"{count_fp8_parameters(model):,} parameters in FP8 GEMMs")
  errors = fp8_controls.accumulation_errors(LENGTHS), fp8_controls.outlier_errors(EXPONENTS)
  print("\n\n".join([results_table(runs), *map(error_table, ("k", "exponent"), errors)]))
  if values.out:
    write_svg(values.out, make_panels(runs, *errors), columns=2)
  return int(not is_within_limit(runs, values.controls))


def is_within_limit(runs: Runs, controls: bool) -> bool:
  """Whether fp8 costs at most LIMIT and, with `controls`, one scale per matrix costs more.

  False if a run is missing.
  """
  fp8, per_tensor = (
    relative_to_bf16(runs, name, "heldout") if name in runs else [] for name in ("fp8", "per tensor, outliers")
  )
  if not fp8 or (controls and not per_tensor):
    return False
  return statistics.mean(fp8) <= LIMIT and (not controls or LIMIT < statistics.mean(per_tensor))


def train_arm(name: str, values: flags.FlagValues, workdir: str, fields: Mapping[str, Any]) -> dict[str, Any] | None:
  """Trains a run of an arm, or continues it, unless --report is set. Returns the result of `read_run`.

  Raises:
    UserError: the run failed, or the workdir has a run with other settings.
  """
  check_same_settings(workdir, load_config(values.config, fields))
  if not values.report:
    print(f"== {workdir}", flush=True)
    command = [sys.executable, "-m", "benchmarks.fp8_controls", f"--config={values.config}", f"--workdir={workdir}"]
    code = subprocess.call([*command, *ARMS[name][1], *(f"--config.{path}={value}" for path, value in fields.items())])
    if code:
      raise UserError(f"the run in {workdir} ended with exit code {code}, see above; the same command resumes it")
  return read_run(workdir)


def read_run(workdir: str | os.PathLike) -> dict[str, Any] | None:
  """{"losses": of each step, "heldout": last held-out loss, "last": mean of the last}; None of an unfinished run."""
  events = metrics.read_jsonl(os.path.join(workdir, metrics.EVENTS))
  if not any(e["event"] == "end" and e["reason"] == "finished" for e in events):
    return None
  losses = [line["loss"] for line in metrics.read_jsonl(os.path.join(workdir, metrics.METRICS))]
  heldout = [e["loss"] for e in events if e["event"] == "eval"][-1]
  return {"losses": losses, "heldout": heldout, "last": statistics.mean(losses[-NUM_LAST:])}


def count_fp8_parameters(model: ModelConfig) -> int:
  """Parameters of FP8 GEMMs: all matrices except embedding, head and routers."""
  matrices = {
    path: shape for path, shape in array_shapes(model).items() if path[-1] == "kernel" and "router" not in path
  }
  return sum(math.prod(shape) for path, shape in matrices.items() if path[1].endswith("_layers") and path[-2] != "proj")


def relative_to_bf16(runs: Runs, name: str, key: str) -> list[float]:
  """Relative difference of `key` between arm `name` and bf16, of each seed."""
  return [run[key] / runs["bf16"][seed][key] - 1 for seed, run in runs[name].items()]


def results_table(runs: Runs) -> str:
  """A Markdown table, a row for each arm."""
  measures = {
    "heldout": "held-out loss",
    "frozen_heldout": "held-out loss of bf16's weights",
    "last": "training loss at the end",
  }
  columns = ("", "held-out loss, each seed", *(f"{label}, above bf16" for label in measures.values()))
  rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
  for name, seeds in runs.items():
    losses = ", ".join(f"{run['heldout']:.4f}" for run in seeds.values())
    rows.append(
      f"| {name} | {losses} | {' | '.join(format_percent(relative_to_bf16(runs, name, key)) for key in measures)} |"
    )
  return "\n".join(rows)


def format_percent(values: Sequence[float]) -> str:
  """Fractions in per cent; of several also their mean and its standard error."""
  each = ", ".join(f"{value:+.2%}" for value in values)
  if len(values) < 2:
    return each
  return f"{each}: {statistics.mean(values):+.2%} ± {statistics.stdev(values) / math.sqrt(len(values)):.2%}"


def error_table(x_name: str, errors: Curves) -> str:
  """A Markdown table of errors, a row for each curve."""
  xs = [x for x, _ in next(iter(errors.values()))]
  rows = [f"| {x_name} | {' | '.join(map(str, xs))} |", "|---" * (len(xs) + 1) + "|"]
  return "\n".join(
    rows + [f"| {name} | {' | '.join(f'{e:.2g}' for _, e in points)} |" for name, points in errors.items()]
  )


def make_panels(runs: Runs, accumulation: Curves, outliers: Curves) -> list[tuple[str, list[Series], str]]:
  """The panels for `write_svg`."""
  losses = {name: moving_average([run["losses"] for run in seeds.values()]) for name, seeds in runs.items()}
  gaps = {
    name: moving_average([percent_above(run["losses"], runs["bf16"][seed]["losses"]) for seed, run in seeds.items()])
    for name, seeds in runs.items()
    if name != "bf16"
  }
  return [
    ("training loss", [Series(name, points) for name, points in losses.items() if name in ARMS_PER_SEED], "log"),
    ("training loss above bf16, per cent", [Series(name, points) for name, points in gaps.items()], "linear"),
    ("error of 14-bit accumulation over k", [Series(name, points) for name, points in accumulation.items()], "log"),
    (
      "error of a GEMM, outliers of 2^n, one scale for",
      [Series(name, points) for name, points in outliers.items()],
      "log",
    ),
  ]


def percent_above(losses: Sequence[float], base: Sequence[float]) -> list[float]:
  """Difference of each loss to the base in per cent."""
  return [100 * (a / b - 1) for a, b in zip(losses, base, strict=True)]


def moving_average(seeds: Sequence[Sequence[float]]) -> list[tuple[int, float]]:
  """[(step, mean over seeds and the last NUM_LAST steps)]. `seeds`: a value per step of each seed."""
  size = min(NUM_LAST, len(seeds[0]))
  return [
    (end, statistics.mean(value for values in seeds for value in values[end - size : end]))
    for end in range(size, len(seeds[0]) + 1)
  ]


if __name__ == "__main__":
  run_program(main)
