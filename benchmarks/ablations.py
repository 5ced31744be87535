"""Ablations of the architecture at equal training FLOPs:  python -m benchmarks.ablations --workdir=runs/ablations

Trains every variant of configs/small.py on the same text, once per seed, with the FLOPs that VARIANTS["mla"] takes for
--steps steps. The same command continues: finished runs are not repeated, an interrupted one resumes. Other settings
need another --workdir. At the end it prints a table. --out writes an SVG: smoothed losses over FLOPs, the mean over
seeds.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from benchmarks.curve import write_svg
from deepseek_jax.checkpoint.compatibility import check_compatible
from deepseek_jax.config import Config
from deepseek_jax.errors import ConfigError, UserError
from deepseek_jax.flags import define_config_flags, load_config, parse, run_program
from deepseek_jax.plan.flops import cache_elements_per_token, count_parameters, training_flops
from deepseek_jax.training import metrics
from deepseek_jax.training.plot import Series

ATTENTION = {"model.attention.kind": "gqa", "model.attention.head_dim": 48}  # as wide as MLA's heads, 32 + 16
BIAS_BALANCED = {"model.moe.router_bias": True, "balance.bias_update_rate": 1e-3, "balance.expert_loss": 1e-4}  # as V3
WITHOUT_BIAS = {"model.moe.router_bias": False, "balance.bias_update_rate": 0.0}
# Overrides of configs/small.py without multi-token prediction.
VARIANTS = {
  "mla": BIAS_BALANCED,
  "gqa": {**BIAS_BALANCED, **ATTENTION, "model.attention.kv_heads": 2},
  "mha": {**BIAS_BALANCED, **ATTENTION, "model.attention.kv_heads": 4},
  "aux": {**WITHOUT_BIAS, "balance.expert_loss": 1e-2},  # DeepSeekMoE's weight at its small scale (section 4.1)
  "none": {**WITHOUT_BIAS, "balance.expert_loss": 0.0},
  "mtp": {**BIAS_BALANCED, "model.num_mtp_layers": 1},
  "mtp_tokens": {**BIAS_BALANCED, "model.num_mtp_layers": 1},  # as many tokens as "mla" instead of as many FLOPs
}
PANELS = (
  ("attention: loss", "loss", "linear", {"mla": "MLA", "gqa": "GQA", "mha": "MHA"}),
  ("balance: loss", "loss", "linear", {"mla": "bias", "aux": "auxiliary loss", "none": "none"}),
  ("balance: MaxVio, mean of layers", "max_vio", "from zero", {"mla": "bias", "aux": "auxiliary loss", "none": "none"}),
  ("multi-token prediction: loss", "loss", "linear", {"mla": "off", "mtp": "on", "mtp_tokens": "on, equal tokens"}),
)
NUM_POINTS = 40  # of a smoothed curve
NUM_SKIPPED = 4  # first points, where all losses fall from 5.6 alike
# Fields that results do not depend on.
IGNORED_FIELDS = ("data.cache", "data.verify", "checkpoint.", "log.tensorboard", "sample.")

# (config, lines of metrics.jsonl, the last evaluation)
Run = tuple[Config, list[dict[str, Any]], dict[str, Any]]


def main(argv: list[str]) -> int:
  values = flags.FlagValues()
  define_config_flags(values, "small")
  flags.DEFINE_string("workdir", "runs/ablations", "folder of the runs", flag_values=values)
  flags.DEFINE_string("out", None, "SVG file to write", flag_values=values)
  flags.DEFINE_integer("steps", 700, "steps of the first variant", lower_bound=1, flag_values=values)
  flags.DEFINE_integer("seeds", 2, "runs of each variant", lower_bound=1, flag_values=values)
  flags.DEFINE_list("variants", list(VARIANTS), "variants to train", flag_values=values)
  overrides = parse(argv, values, __doc__)
  if unknown := set(values.variants) - set(VARIANTS):
    raise ConfigError(f"--variants must be among {', '.join(VARIANTS)}, not {', '.join(sorted(unknown))}")
  runs: dict[str, list[Run]] = {}  # {variant: a run per seed}
  for seed in range(values.seeds):
    for name in values.variants:
      runs.setdefault(name, []).append(train_variant(values, {**overrides, "seed": seed}, name))
  print(results_table(runs))
  if values.out:
    panels = [
      (title, [Series(label, mean_curve(runs[name], key)) for name, label in names.items() if name in runs], scale)
      for title, key, scale, names in PANELS
    ]
    write_svg(values.out, panels, columns=2)
  return 0


def variant_overrides(overrides: Mapping[str, Any], name: str, steps: int) -> dict[str, Any]:
  """{field: value} of a run of variant `name`."""
  return {
    "model.num_mtp_layers": 0, "train.steps": steps, "schedule.steps": steps, **overrides, **VARIANTS[name]
  }  # fmt: skip


def train_variant(values: flags.FlagValues, overrides: Mapping[str, Any], name: str) -> Run:
  """Trains a variant, or continues its run. Raises as `train_run`."""
  base, config = (load_config(values.config, variant_overrides(overrides, n, values.steps)) for n in ("mla", name))
  flops_per_token, base_flops_per_token = (training_flops(c.model, c.data.seq).causal for c in (config, base))
  steps = values.steps if name == "mtp_tokens" else round(values.steps * base_flops_per_token / flops_per_token)
  # The config's warm-up, where the run is not shorter than twice that.
  fields = {
    "schedule.warmup_steps": min(config.schedule.warmup_steps, steps // 2),
    # V3 lowers the weight of multi-token prediction after two thirds of its tokens.
    "mtp.tokens": (steps * config.train.global_batch * config.data.seq * 2 // 3,),
    **variant_overrides(overrides, name, steps),
  }
  workdir = os.path.join(values.workdir, f"{name}-{config.seed}")
  return train_run(values.config, workdir, fields, f"{name}, seed {config.seed}: {steps} steps")


def train_run(config_name: str, workdir: str, fields: Mapping[str, Any], title: str) -> Run:
  """Trains in a process of its own, or continues the run in `workdir`; a finished one is not repeated.

  Args:
    fields: {field: value} that differ from the config `config_name`.
    title: is printed before.

  Raises:
    UserError: the run failed, or the workdir has a run with other settings.
  """
  config = load_config(config_name, fields)
  check_same_settings(workdir, config)
  command = [sys.executable, "-m", "deepseek_jax.train", f"--config={config_name}", f"--workdir={workdir}"]
  print(f"== {title}", flush=True)
  code = subprocess.call([*command, *(f"--config.{path}={value}" for path, value in fields.items())])
  if code:
    raise UserError(f"the run in {workdir} ended with exit code {code}, see above; the same command resumes it")
  lines = metrics.read_jsonl(os.path.join(workdir, metrics.METRICS))
  evaluations = [e for e in metrics.read_jsonl(os.path.join(workdir, metrics.EVENTS)) if e["event"] == "eval"]
  return config, lines, evaluations[-1]


def check_same_settings(workdir: str, config: Config) -> None:
  """Checks that a run in `workdir`, if there is one, had the settings of `config`.

  Raises:
    UserError: it had others, so its results are not those of `config`.
  """
  path = os.path.join(workdir, "config.json")
  if not os.path.exists(path):
    return
  with open(path, encoding="utf-8") as f:
    differences = check_compatible(json.load(f), config, None, None)
  if changed := [f"{p}: {old} there, {new} now" for p, old, new in differences if not p.startswith(IGNORED_FIELDS)]:
    raise UserError(f"the run in {workdir} has other settings ({'; '.join(changed)}): give another --workdir")


def results_table(runs: Mapping[str, Sequence[Run]]) -> str:
  """A Markdown table, a row for each variant. `runs`: {variant: a run per seed}."""
  rows = [
    "| variant | parameters | cache per token | tokens | held-out bits per byte, each seed | mean | MaxVio at the end |",
    "|---|---|---|---|---|---|---|",
  ]
  for name, seeds in runs.items():
    config, lines, _ = seeds[0]
    bits = [evaluation["bits_per_byte"] for _, _, evaluation in seeds]
    max_vio = statistics.mean(line["max_vio"] for _, lines, _ in seeds for line in lines[-len(lines) // 10 :])
    parameters = count_parameters(config.model)
    rows.append(
      f"| {name} | {parameters.total + parameters.mtp:,} | {cache_elements_per_token(config.model)} | {lines[-1]['tokens']:,} | "
      f"{', '.join(f'{b:.4f}' for b in bits)} | {statistics.mean(bits):.4f} | {max_vio:.2f} |"
    )
  return "\n".join(rows)


def mean_curve(seeds: Sequence[Run], key: str) -> list[tuple[float, float]]:
  """[(training FLOPs, mean of metric `key` over seeds and consecutive steps)]."""
  config, lines, _ = seeds[0]
  flops_per_token, size = training_flops(config.model, config.data.seq).causal, max(len(lines) // NUM_POINTS, 1)
  points = [
    (
      lines[start + size - 1]["tokens"] * flops_per_token,
      statistics.mean(line[key] for _, lines, _ in seeds for line in lines[start : start + size]),
    )
    for start in range(0, len(lines) - size + 1, size)
  ]
  return points[NUM_SKIPPED:] or points


if __name__ == "__main__":
  run_program(main)
