"""Training in fp8 beside bf16, with controls:  python -m benchmarks.fp8_training --workdir=runs/fp8_training --out=curves.svg

The config of this file, a V3 of bytes, is trained by each of ARMS on the same batches: the first two once per seed, the
others, which say what the first two can show, with seed 0. Runs that are there already are not repeated, and one that was
cut short goes on: start the command again. --report trains nothing: it shows the runs that have ended. Losses count at the
end: on held-out text, and the mean of the last LAST steps, which all arms take with the same batches.

Runs that differ by roundings alone go apart as those of other seeds do, if less. What roundings cost by themselves shows the
held-out loss of one set of weights, those that bf16 ended with, in the precision of each arm: no training, and no such noise.

It ends with tables and, for --out, a picture. The exit code is 1 if fp8 is more than LIMIT above bf16 on held-out text, the
mean over seeds, or one scale a matrix, of the controls, is not.
"""

import itertools
import math
import os
import statistics
import subprocess
import sys

from absl import flags
from ml_collections import ConfigDict

from benchmarks import fp8_controls
from benchmarks.ablations import check_same_settings
from benchmarks.curve import write_svg
from deepseek_jax.checkpoint.parts import layout
from deepseek_jax.errors import UserError
from deepseek_jax.flags import define_config_flags, load_config, parse, run_program
from deepseek_jax.training import metrics
from deepseek_jax.training.plot import Series

STEPS = 300
LAST = 30  # steps at the end whose losses are averaged
LIMIT = 0.0025  # of the loss: what the V3 report (section 3.3) found at most
BF16, FP8 = {"model.precision": "bf16"}, {"model.precision": "fp8"}
# name -> (what differs from the config, what benchmarks/fp8_controls.py adds)
ARMS = {
  "bf16": (BF16, ()),
  "fp8": (FP8, ()),
  "fp8, outliers": (FP8, ("--outliers",)),
  "per tensor, outliers": (FP8, ("--outliers", "--per_tensor")),
  "float32": ({**BF16, "model.compute_dtype": "float32"}, ()),  # how far another rounding alone leads
}
EVERY_SEED = ("bf16", "fp8")
FROZEN = {"train.steps": 1, "schedule.peak": 1e-30, "balance.bias_update_rate": 0.0}  # a run that changes no weight
EXPONENTS = (0, 4, 8, 10, 12, 13, 14, 15, 16, 17, 18)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


def get_config() -> ConfigDict:
  return ConfigDict(
    dict(
      name="fp8_training",
      model=dict(
        vocab=272,  # bytes: the head, which is not FP8, is small
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


def main(argv) -> int:
  values = flags.FlagValues()
  define_config_flags(values, "benchmarks/fp8_training.py")
  flags.DEFINE_string("workdir", "runs/fp8_training", "folder of the runs", flag_values=values)
  flags.DEFINE_string("out", None, "the SVG file to write", flag_values=values)
  flags.DEFINE_integer("seeds", 3, "runs of bf16 and fp8", lower_bound=1, flag_values=values)
  flags.DEFINE_boolean("controls", True, "all arms with seed 0, not bf16 and fp8 alone", flag_values=values)
  flags.DEFINE_boolean("report", False, "train nothing", flag_values=values)
  overrides = parse(argv, values, __doc__)
  runs = {}  # name of an arm -> {seed: its run}
  first = ARMS if values.controls else EVERY_SEED
  for seed, name in [*((0, name) for name in first), *itertools.product(range(1, values.seeds), EVERY_SEED)]:
    workdir = os.path.join(values.workdir, f"{name.replace(', ', '-').replace(' ', '-')}-{seed}")
    chosen = {**overrides, "seed": seed, **ARMS[name][0]}
    frozen = {**chosen, **FROZEN, "init_from": os.path.join(values.workdir, f"bf16-{seed}")}
    rounded = name != "bf16" and trained(name, values, f"{workdir}-frozen", frozen)
    run = trained(name, values, workdir, chosen)
    if run and (rounded or name == "bf16"):
      runs.setdefault(name, {})[seed] = {**run, "rounded": (rounded or run)["heldout"]}
  model = load_config(values.config, overrides).model
  print(f"{fp8_parameters(model):,} parameters in FP8 GEMMs")
  errors = fp8_controls.accumulation_errors(LENGTHS), fp8_controls.outlier_errors(EXPONENTS)
  print("\n\n".join([table(runs), *map(error_table, ("k", "exponent"), errors)]))
  if values.out:
    write_svg(values.out, panels(runs, *errors), columns=2)
  return int(not shown(runs, values.controls))


def shown(runs, controls):
  """Whether fp8 costs at most LIMIT and, of `controls`, one scale a matrix more. False until that is known."""
  fp8, per_tensor = (above(runs, name, "heldout") if name in runs else [] for name in ("fp8", "per tensor, outliers"))
  known = bool(fp8 and (per_tensor or not controls))
  return known and statistics.mean(fp8) <= LIMIT and (not controls or LIMIT < statistics.mean(per_tensor))


def trained(name, values, workdir, chosen):
  """The run of an arm, trained as far as it has not been, or what `ended` says of it where nothing is to be trained."""
  check_same_settings(workdir, load_config(values.config, chosen))
  if not values.report:
    print(f"== {workdir}", flush=True)
    command = [sys.executable, "-m", "benchmarks.fp8_controls", f"--config={values.config}", f"--workdir={workdir}"]
    code = subprocess.call([*command, *ARMS[name][1], *(f"--config.{path}={value}" for path, value in chosen.items())])
    if code:
      raise UserError(f"the run in {workdir} ended with code {code}, see above; the same command goes on from there")
  return ended(workdir)


def ended(workdir):
  """What a run came to, {"losses": [of each step], "heldout", "last"}, or None of one that has not ended."""
  events = metrics.read(os.path.join(workdir, metrics.EVENTS))
  if not any(e["event"] == "end" and e["reason"] == "finished" for e in events):
    return None
  losses = [line["loss"] for line in metrics.read(os.path.join(workdir, metrics.METRICS))]
  heldout = [e["loss"] for e in events if e["event"] == "eval"][-1]
  return {"losses": losses, "heldout": heldout, "last": statistics.mean(losses[-LAST:])}


def fp8_parameters(model):
  """Parameters of products that precision=fp8 rounds: all matrices but those of embedding, head and routers."""
  matrices = {
    path: shape for path, (shape, _) in layout(model).items() if path[-1] == "kernel" and "router" not in path
  }
  return sum(math.prod(shape) for path, shape in matrices.items() if path[1].endswith("_layers") and path[-2] != "proj")


def above(runs, name, key):
  """[how far `key` of each seed of `name` is above that of bf16 with this seed, as a share of it]."""
  return [run[key] / runs["bf16"][seed][key] - 1 for seed, run in runs[name].items()]


def table(runs):
  """The runs as a Markdown table."""
  measures = {
    "heldout": "held-out loss",
    "rounded": "held-out loss of bf16's weights",
    "last": "training loss at the end",
  }
  columns = ("", "held-out loss, each seed", *(f"{words}, above bf16" for words in measures.values()))
  rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
  for name, seeds in runs.items():
    losses = ", ".join(f"{run['heldout']:.4f}" for run in seeds.values())
    rows.append(f"| {name} | {losses} | {' | '.join(shares(above(runs, name, key)) for key in measures)} |")
  return "\n".join(rows)


def shares(values):
  """Shares in per cent, and of several their mean with its standard error."""
  each = ", ".join(f"{value:+.2%}" for value in values)
  if len(values) < 2:
    return each
  return f"{each}: {statistics.mean(values):+.2%} ± {statistics.stdev(values) / math.sqrt(len(values)):.2%}"


def error_table(of, errors):
  """Curves of errors, {name: [(x, error)]}, as a Markdown table."""
  xs = [x for x, _ in next(iter(errors.values()))]
  rows = [f"| {of} | {' | '.join(map(str, xs))} |", "|---" * (len(xs) + 1) + "|"]
  return "\n".join(
    rows + [f"| {name} | {' | '.join(f'{e:.2g}' for _, e in points)} |" for name, points in errors.items()]
  )


def panels(runs, accumulation, outliers):
  """What `write_svg` draws."""
  losses = {name: curve([run["losses"] for run in seeds.values()]) for name, seeds in runs.items()}
  gaps = {
    name: curve([relative(run["losses"], runs["bf16"][seed]["losses"]) for seed, run in seeds.items()])
    for name, seeds in runs.items()
    if name != "bf16"
  }
  return [
    ("training loss", [Series(name, points) for name, points in losses.items() if name in EVERY_SEED], "log"),
    ("training loss above bf16, per cent", [Series(name, points) for name, points in gaps.items()], "linear"),
    ("error of sums in 14 bits over k", [Series(name, points) for name, points in accumulation.items()], "log"),
    (
      "error of a product, outliers of 2^n, a scale",
      [Series(name, points) for name, points in outliers.items()],
      "log",
    ),
  ]


def relative(losses, base):
  """Per cent that each of `losses` is above that of `base`."""
  return [100 * (a / b - 1) for a, b in zip(losses, base, strict=True)]


def curve(seeds):
  """[(step, mean over seeds and the LAST steps before it)]."""
  size = min(LAST, len(seeds[0]))
  return [
    (end, statistics.mean(value for values in seeds for value in values[end - size : end]))
    for end in range(size, len(seeds[0]) + 1)
  ]


if __name__ == "__main__":
  run_program(main)
