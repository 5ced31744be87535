"""What each part of the architecture gives, trained side by side:  python -m benchmarks.ablations --workdir=runs/ablations

Every variant of configs/tiny.py gets the training FLOPs that VARIANTS["mla"] spends in --steps steps, on the same text, once
per seed. Runs that are there already are not repeated, and one that was cut short goes on: start the command again; other
settings need another --workdir. It ends with a table and, for --out, a picture: losses over the FLOPs spent, smoothed,
the mean over seeds.
"""

import json
import os
import statistics
import subprocess
import sys

from absl import flags

from benchmarks.curve import write_svg
from deepseek_jax.checkpoint.compatibility import check_compatible
from deepseek_jax.errors import ConfigError, UserError
from deepseek_jax.flags import define_config_flags, load_config, parse, run_program
from deepseek_jax.plan.flops import count_parameters, training_flops
from deepseek_jax.training import metrics
from deepseek_jax.training.plot import Series

ATTENTION = {"model.attention.kind": "gqa", "model.attention.head_dim": 48}  # heads of MLA are 32 + 16 wide
BIASED = {"model.moe.router_bias": True, "balance.bias_update_rate": 1e-3, "balance.expert_loss": 1e-4}  # V3's recipe
UNBIASED = {"model.moe.router_bias": False, "balance.bias_update_rate": 0.0}
# What differs from configs/tiny.py without multi-token prediction; the first differs in nothing else.
VARIANTS = {
  "mla": BIASED,
  "gqa": {**BIASED, **ATTENTION, "model.attention.kv_heads": 2},
  "mha": {**BIASED, **ATTENTION, "model.attention.kv_heads": 4},
  "aux": {**UNBIASED, "balance.expert_loss": 1e-2},  # DeepSeekMoE's weight at its small scale (section 4.1)
  "none": {**UNBIASED, "balance.expert_loss": 0.0},
  "mtp": {**BIASED, "model.num_mtp_layers": 1},
  "mtp_tokens": {**BIASED, "model.num_mtp_layers": 1},  # the tokens of "mla" instead of its FLOPs
}
PANELS = (
  ("attention: loss", "loss", "linear", {"mla": "MLA", "gqa": "GQA", "mha": "MHA"}),
  ("balance: loss", "loss", "linear", {"mla": "bias", "aux": "auxiliary loss", "none": "none"}),
  ("balance: MaxVio, mean of layers", "max_vio", "from zero", {"mla": "bias", "aux": "auxiliary loss", "none": "none"}),
  ("multi-token prediction: loss", "loss", "linear", {"mla": "off", "mtp": "on", "mtp_tokens": "on, equal tokens"}),
)
POINTS = 40  # means that a curve is smoothed to
SKIPPED = 4  # of them, at the start, where all losses fall from 5.6 alike
HARMLESS = ("data.cache", "data.verify", "checkpoint.", "log.tensorboard", "sample.")  # results do not depend on these


def main(argv) -> int:
  values = flags.FlagValues()
  define_config_flags(values, "tiny")
  flags.DEFINE_string("workdir", "runs/ablations", "folder of the runs", flag_values=values)
  flags.DEFINE_string("out", None, "the SVG file to write", flag_values=values)
  flags.DEFINE_integer("steps", 700, "steps of the first variant", lower_bound=1, flag_values=values)
  flags.DEFINE_integer("seeds", 2, "runs of each variant", lower_bound=1, flag_values=values)
  flags.DEFINE_list("variants", list(VARIANTS), "which to train", flag_values=values)
  overrides = parse(argv, values, __doc__)
  if unknown := set(values.variants) - set(VARIANTS):
    raise ConfigError(f"--variants knows {', '.join(VARIANTS)}, not {', '.join(sorted(unknown))}")
  runs = {}  # variant -> its runs, one per seed
  for seed in range(values.seeds):
    for name in values.variants:
      runs.setdefault(name, []).append(train(values, {**overrides, "seed": seed}, name))
  print(table(runs))
  if values.out:
    panels = [
      (title, [Series(label, curve(runs[name], key)) for name, label in names.items() if name in runs], scale)
      for title, key, scale, names in PANELS
    ]
    write_svg(values.out, panels, columns=2)
  return 0


def settings(overrides, name, steps):
  """{dotted path: value} of a run."""
  length = {"train.steps": steps, "schedule.steps": steps}
  return {"model.num_mtp_layers": 0, **length, **overrides, **VARIANTS[name]}


def train(values, overrides, name):
  """Trains a variant as far as it has not been trained. Returns (its config, its metrics, its last evaluation)."""
  first, config = (load_config(values.config, settings(overrides, n, values.steps)) for n in ("mla", name))
  cost, spent = (training_flops(c.model, c.data.seq).causal for c in (config, first))
  steps = values.steps if name == "mtp_tokens" else round(values.steps * spent / cost)
  chosen = settings(overrides, name, steps)
  workdir = os.path.join(values.workdir, f"{name}-{config.seed}")
  check_settings(workdir, load_config(values.config, chosen))
  command = [sys.executable, "-m", "deepseek_jax.train", f"--config={values.config}", f"--workdir={workdir}"]
  print(f"== {name}, seed {config.seed}: {steps} steps", flush=True)
  code = subprocess.call([*command, *(f"--config.{path}={value}" for path, value in chosen.items())])
  if code:
    raise UserError(f"the run in {workdir} ended with code {code}, see above; the same command goes on from there")
  lines = metrics.read(os.path.join(workdir, metrics.METRICS))
  evaluations = [e for e in metrics.read(os.path.join(workdir, metrics.EVENTS)) if e["event"] == "eval"]
  return config, lines, evaluations[-1]


def check_settings(workdir, config):
  """Raises UserError if there is a run in `workdir` that had other settings: its results would pass for those of `config`."""
  path = os.path.join(workdir, "config.json")
  if not os.path.exists(path):
    return
  with open(path, encoding="utf-8") as f:
    differences = check_compatible(json.load(f), config, None, None)
  if changed := [f"{p}: {old} there, {new} now" for p, old, new in differences if not p.startswith(HARMLESS)]:
    raise UserError(f"the run in {workdir} has other settings ({'; '.join(changed)}): give another --workdir")


def table(runs):
  """The runs as a Markdown table."""
  rows = [
    "| variant | parameters | cache a token | tokens | held-out bits per byte, each seed | mean | MaxVio at the end |",
    "|---|---|---|---|---|---|---|",
  ]
  for name, seeds in runs.items():
    config, lines, _ = seeds[0]
    bits = [evaluation["bits_per_byte"] for _, _, evaluation in seeds]
    vio = statistics.mean(line["max_vio"] for _, lines, _ in seeds for line in lines[-len(lines) // 10 :])
    parameters = count_parameters(config.model)
    rows.append(
      f"| {name} | {parameters.total + parameters.mtp:,} | {cached(config.model)} | {lines[-1]['tokens']:,} | "
      f"{', '.join(f'{b:.4f}' for b in bits)} | {statistics.mean(bits):.4f} | {vio:.2f} |"
    )
  return "\n".join(rows)


def cached(model):
  """Numbers that decoding keeps of a token, in all layers."""
  a = model.attention
  return model.layers * (a.kv_lora_rank + a.qk_rope_head_dim if a.kind == "mla" else 2 * a.kv_heads * a.head_dim)


def curve(seeds, key):
  """[(training FLOPs, mean of `key` over seeds and a stretch of steps)]."""
  config, lines, _ = seeds[0]
  cost, size = training_flops(config.model, config.data.seq).causal, max(len(lines) // POINTS, 1)
  points = [
    (
      lines[start + size - 1]["tokens"] * cost,
      statistics.mean(line[key] for _, lines, _ in seeds for line in lines[start : start + size]),
    )
    for start in range(0, len(lines) - size + 1, size)
  ]
  return points[SKIPPED:] or points


if __name__ == "__main__":
  run_program(main)
