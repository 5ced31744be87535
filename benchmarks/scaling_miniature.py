"""DeepSeek LLM's scaling laws in miniature, on bytes of Python source:  python -m benchmarks.scaling_miniature

Sweeps of models of bytes on two CPU cores: `clean` (dense, with three seeds at the center of each budget and a grid of
learning rates and batches), `noise` (the same text with 30% of its bytes replaced) and `moe` (DeepSeekMoE). The text is that
of torch and transformers in the environment that `make parity` builds, .venv-parity; its hash is in WORKDIR/text.json.
Hours; the same command goes on. --publish=FOLDER writes tables, plans and reports of what has run there, and runs nothing.
Results: docs/results/scaling.md.
"""

import hashlib
import json
import pathlib
import shutil
from collections.abc import Mapping

import numpy as np
from absl import flags

from deepseek_jax.console import current_console
from deepseek_jax.errors import ConfigError, DataError
from deepseek_jax.flags import parse, run_program
from deepseek_jax.scaling import commands, fit_commands
from deepseek_jax.scaling.analysis import FitOptions, fit_table
from deepseek_jax.scaling.table import RunTable, read_table

PACKAGES = ("torch", "transformers")
NOISE = 0.3
PLANS = {
  # name: flags of scaling plan
  "clean": ["--per_budget=7", "--seeds=3", "--grid_budget=1e12"],
  "noise": ["--per_budget=7"],
  "moe": ["--per_budget=5", "--span=2", "--experts=16", "--granularity=4"],
}
MODEL = {"vocab": 272, "init_std": 0.02, "compute_dtype": "float32", "remat": "none"}
MOE = {
  "num_routed_experts": 16, "num_shared_experts": 1, "num_experts_per_token": 3, "mlp": 32, "score": "sigmoid",
  "router_bias": "true", "norm_topk_prob": "true",
}  # fmt: skip


def main(argv: list[str]) -> int:
  values = flags.FlagValues()
  flags.DEFINE_string("environment", ".venv-parity", "whose packages are the text", flag_values=values)
  flags.DEFINE_string("workdir", "runs/scaling", "folder of text, plans and runs", flag_values=values)
  flags.DEFINE_string("sweeps", ",".join(PLANS), "which sweeps", flag_values=values)
  flags.DEFINE_string("budgets", "3e11,1e12,3e12,1e13", "FLOPs of the plans", flag_values=values)
  flags.DEFINE_string("run_budgets", "", "run these budgets alone (default: all)", flag_values=values)
  flags.DEFINE_float("max_minutes", 0.0, "of each sweep; 0: no limit", 0.0, flag_values=values)
  flags.DEFINE_string("publish", None, "folder of tables, plans and reports of what has run", flag_values=values)
  flags.DEFINE_integer("workers", 2, "runs at once", lower_bound=1, flag_values=values)
  parse(argv, values, __doc__)
  workdir = pathlib.Path(values.workdir)
  if values.publish:
    publish(workdir, pathlib.Path(values.publish))
    return 0
  text = write_text(pathlib.Path(values.environment), workdir)
  current_console().print(f"text     {text['bytes']:,} bytes of {text['files']:,} files, sha256 {text['sha256']}")

  code = 0
  for sweep in values.sweeps.split(","):
    if sweep not in PLANS:
      raise ConfigError(f"--sweeps={sweep}: expected some of {', '.join(PLANS)}")
    plan, folder = str(workdir / f"{sweep}.json"), str(workdir / sweep)
    if not pathlib.Path(plan).exists():
      commands.plan(
        ["plan", *config_flags(sweep, workdir), f"--budgets={values.budgets}", *PLANS[sweep], f"--out={plan}"]
      )
    limits = [f"--budgets={values.run_budgets}", f"--max_minutes={values.max_minutes}", f"--workers={values.workers}"]
    code = max(code, commands.run(["run", f"--plan={plan}", f"--workdir={folder}", *limits]))
    if code >= 128:
      return code
    commands.table(["table", f"--workdir={folder}", f"--out={workdir / f'{sweep}.csv'}"])
  return code


def publish(workdir: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes the table, the plan and the report of each sweep, text.json, and summary.md."""
  folder.mkdir(parents=True, exist_ok=True)
  shutil.copy(workdir / "text.json", folder)
  tables = {}
  for sweep in PLANS:
    if not (workdir / sweep).is_dir():
      continue
    shutil.copy(workdir / f"{sweep}.json", folder)
    out = folder / f"{sweep}.csv"
    commands.table(["table", f"--workdir={workdir / sweep}", f"--out={out}"])
    try:
      tables[sweep] = read_table(out)
      plan, title = folder / f"{sweep}.json", f"--title=Scaling laws in miniature: {sweep}"
      fit_commands.report(["report", f"--table={out}", f"--plan={plan}", f"--out={folder / sweep}", title])
    except DataError as error:  # too little has run
      current_console().print(f"{sweep}: no report: {error}", err=True)
  (folder / "summary.md").write_text(summary(tables))


def summary(tables: Mapping[str, RunTable]) -> str:
  """Markdown: the exponents of each sweep, and experts beside dense models at equal FLOPs."""
  lines = ["| sweep | approach | runs | a of M_opt | 95% |", "|---|---|---|---|---|"]
  for sweep, table in tables.items():
    for approach in ("2", "3"):
      try:
        fit = fit_table(table, FitOptions(approach, "M"))
      except DataError as error:
        lines.append(f"| {sweep} | {approach} | {len(table)} | {error} | |")
        continue
      low, high = fit.intervals()["a"]
      lines.append(f"| {sweep} | {approach} | {len(table)} | {fit.values()['a']:.3f} | {low:.3f} to {high:.3f} |")
  lines += ["", "| budget | sweep | best bits per byte | M | seconds of that run |", "|---|---|---|---|---|"]
  for budget in sorted({b for table in tables.values() for b in table["budget"].tolist()}):
    for sweep, table in tables.items():
      rows = [i for i in range(len(table)) if table["budget"][i] == budget]
      if rows:
        best = min(rows, key=lambda i: table["val_bpb"][i])
        values = f"{table['val_bpb'][best]:.4f} | {table['M'][best]:.3g} | {table['seconds'][best]:.0f}"
        lines.append(f"| {budget:.0e} | {sweep} | {values} |")
  return "\n".join(lines) + "\n"


def config_flags(sweep: str, workdir: pathlib.Path) -> list[str]:
  """The base config of a sweep: DeepSeek LLM's recipe for models of bytes."""
  source = workdir / ("noise.jsonl" if sweep == "noise" else "clean.jsonl")
  fields = {f"model.{name}": value for name, value in MODEL.items()}
  fields |= {f"model.moe.{name}": value for name, value in MOE.items()} if sweep == "moe" else {}
  fields |= {"balance.bias_update_rate": 0.001, "balance.expert_loss": 1e-4} if sweep == "moe" else {}
  fields |= {"data.sources": source, "data.tokenizer": "byte", "data.heldout_fraction": 0.01}
  fields |= {
    "train.microbatch": 0,
    "train.loss_chunk": 128,
    "eval.final_sequences": 4096,
    "mesh.context": 1,
    "mesh.fsdp": 1,
  }
  return ["--config=7b", "--seq=128", *(f"--config.{name}={value}" for name, value in fields.items())]


def write_text(environment: pathlib.Path, workdir: pathlib.Path) -> dict[str, int | str]:
  """Writes clean.jsonl and noise.jsonl, a document for each file, and text.json, which it returns; once."""
  record = workdir / "text.json"
  if record.exists():
    return json.loads(record.read_text())
  folders = [found for name in PACKAGES for found in environment.glob(f"lib/python*/site-packages/{name}")]
  if len(folders) != len(PACKAGES):
    raise ConfigError(f"--environment={environment} lacks {' or '.join(PACKAGES)}: make parity builds one")
  workdir.mkdir(parents=True, exist_ok=True)
  digest, generator, files, size = hashlib.sha256(), np.random.default_rng(0), 0, 0
  with open(workdir / "clean.jsonl", "w") as clean, open(workdir / "noise.jsonl", "w") as noise:
    for folder in folders:
      for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes().decode("utf-8", "replace")
        raw = np.frombuffer(content.encode("ascii", "replace"), np.uint8).copy()  # as many characters as bytes
        if not raw.size:
          continue
        digest.update(raw.tobytes())
        files, size = files + 1, size + raw.size
        clean.write(json.dumps({"text": raw.tobytes().decode("ascii")}) + "\n")
        replaced = generator.random(raw.size) < NOISE
        raw[replaced] = generator.integers(32, 127, int(replaced.sum()), np.uint8)
        noise.write(json.dumps({"text": raw.tobytes().decode("ascii")}) + "\n")
  result: dict[str, int | str] = {"bytes": size, "files": files, "sha256": digest.hexdigest(), "noise": NOISE}
  record.write_text(json.dumps(result) + "\n")
  return result


if __name__ == "__main__":
  run_program(main)
