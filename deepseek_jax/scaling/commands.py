"""The commands that make runs: plan, run and table."""

import math
import os
from collections.abc import Iterator, Sequence

from absl import flags

from deepseek_jax.console import current_console
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import define_config_flags, load_config, parse, write_output
from deepseek_jax.json_output import show_result

PLAN = """Plans the runs of a sweep:

  python -m deepseek_jax.scaling plan --budgets=1e17:3e20:8 --per_budget=10 --seq=4096 --law=deepseek --out=sweep.json
  python -m deepseek_jax.scaling plan --config=small_dense --budgets=3e11,1e12 --per_budget=7 --seeds=3 --out=sweep.json
  python -m deepseek_jax.scaling plan --tokens=2e12              the size to train with so many tokens
  python -m deepseek_jax.scaling plan --hours=24 --topology=v5p:8x8x16
  python -m deepseek_jax.scaling plan --plan=sweep.json --preregister=runs.csv --out=sweep.json

Data, schedule, optimizer and kind of model are those of --config, any field of which can be set. Depth, width, batch,
learning rate and steps are planned."""

RUN = """Trains the runs of a plan, small ones first; the same command again goes on:

  python -m deepseek_jax.scaling run --plan=sweep.json --workdir=W
  python -m deepseek_jax.scaling run --workdir=W --shard=1/4            the first of four parts
  python -m deepseek_jax.scaling run --workdir=W --max_minutes=9 --workers=2

Each run is a folder W/runs/RUN_ID, as training writes it, with its report."""

TABLE = """Writes the results of a sweep as CSV:

  python -m deepseek_jax.scaling table --workdir=W --out=runs.csv"""


def parse_budgets(text: str) -> tuple[float, ...]:
  """FLOPs of --budgets: "1e17:3e20:8" are 8 on a log grid, "3e11,1e12" are these. Raises ConfigError."""
  try:
    if ":" in text:
      low, high, count = text.split(":")
      first, last, n = float(low), float(high), int(count)
      if not (0 < first <= last < math.inf and n >= 1):
        raise ValueError
      steps = max(n - 1, 1)
      return tuple(float(f"{first * (last / first) ** (i / steps):.4g}") for i in range(n))
    return tuple(sorted({float(part) for part in text.split(",")}))
  except ValueError:
    raise ConfigError(
      f"--budgets={text}: expected LOW:HIGH:COUNT, as 1e17:3e20:8, or FLOPs with commas between"
    ) from None


def parse_numbers(name: str, text: str) -> tuple[float, ...]:
  """Numbers with commas between. Raises ConfigError."""
  try:
    return tuple(float(part) for part in text.split(",") if part.strip())
  except ValueError:
    raise ConfigError(f"--{name}={text}: expected numbers with commas between") from None


def _plan_flags() -> flags.FlagValues:
  values = flags.FlagValues()
  define_config_flags(values, "7b")
  for name, default, doc in (
    ("budgets", None, "FLOPs: LOW:HIGH:COUNT on a log grid, or a list with commas"),
    ("law", "deepseek", "of batch sizes and learning rates: deepseek, steplaw, or a file that hparams --json wrote"),
    ("out", None, "the plan's file"),
    ("grid_lr", "0.5,1,2", "factors of the learning rate on the grid"),
    ("grid_batch", "0.5,1,2", "factors of the batch on the grid"),
    ("experts", "", "of a mixture of experts: numbers of routed experts, each a ladder of its own"),
    ("granularity", "", "of a mixture of experts: granularities, each a ladder of its own"),
    ("table", None, "runs from which M_opt is refitted (approach 2), instead of DeepSeek's law"),
    ("columns", "", "names of the table's columns: flops=C,loss=final_loss"),
    ("topology", None, "for hours: v5p:8x8x16, h100:64x8, ...; here: time steps on this machine"),
    ("plan", None, "with --preregister: the plan to add a prediction to"),
    ("preregister", None, "a table of the smaller budgets, from which the loss of the plan's largest one is predicted"),
    ("json", None, "also write the plan to this file; - for stdout, and nothing else"),
  ):  # fmt: skip
    flags.DEFINE_string(name, default, doc, flag_values=values)
  for name, number, doc in (
    ("span", 4.0, "allocations go from M_opt / span to M_opt * span"),
    ("lr_scale", 1.0, "factor of the law's learning rate"),
    ("batch_scale", 1.0, "factor of the law's batch"),
    ("grid_budget", 0.0, "the budget whose central allocation also has a grid of learning rates and batches; 0: none"),
    ("tokens", 0.0, "advise the size to train with so many tokens, instead of a sweep"),
    ("hours", 0.0, "advise the size to train in so many hours on --topology, instead of a sweep"),
  ):  # fmt: skip
    flags.DEFINE_float(name, number, doc, flag_values=values)
  for name, count, doc in (
    ("per_budget", 10, "allocations of each budget"),
    ("seq", None, "tokens of a sequence (default: the config's)"),
    ("seeds", 1, "seeds of the allocation at the optimum"),
    ("batch_multiple", 1, "sequences of a batch are a multiple of it, as of the devices that share it"),
  ):  # fmt: skip
    flags.DEFINE_integer(name, count, doc, lower_bound=1, flag_values=values)
  return values


def plan(argv: list[str]) -> int:
  """The command plan."""
  values = _plan_flags()
  overrides = parse(argv, values, PLAN)
  if values.topology != "here":
    os.environ["JAX_PLATFORMS"] = "cpu"  # a plan uses no accelerator
  if values.preregister:
    return _preregister(values)
  if values.seq:
    overrides["data.seq"] = str(values.seq)
  base = load_config(values.config, overrides)
  if base.stages:
    raise ConfigError(
      f"--config={values.config} has stages of training, and the runs of a sweep have one: give a config without"
    )

  from deepseek_jax.scaling.cost import Cost, advise, format_plan, sweep_cost
  from deepseek_jax.scaling.hparams import load_law
  from deepseek_jax.scaling.shapes import MoEVariant
  from deepseek_jax.scaling.sweep_plan import SweepOptions, plan_sweep

  allocation = _allocation(values)
  law = load_law(values.law)
  if values.tokens or values.hours:
    advice = advise(base, law, allocation, values.tokens, values.hours, values.topology)
    return show_result(advice.text, advice.to_json(), values.json)
  if not values.budgets:
    raise ConfigError("--budgets is required, for example --budgets=1e17:3e20:8 (see --help); or --tokens, or --hours")
  ladders = {name: parse_numbers(name, getattr(values, name)) or (0.0,) for name in ("experts", "granularity")}
  for name, numbers in ladders.items():
    if any(number < 0 or number % 1 for number in numbers):
      raise ConfigError(f"--{name}={getattr(values, name)}: expected whole numbers with commas between")
  variants = [MoEVariant(int(e), int(g)) for e in ladders["experts"] for g in ladders["granularity"]]
  options = SweepOptions(
    parse_budgets(values.budgets), values.per_budget, values.span, values.seeds, values.lr_scale, values.batch_scale,
    values.grid_budget, parse_numbers("grid_lr", values.grid_lr), parse_numbers("grid_batch", values.grid_batch),
    values.batch_multiple, tuple(variants), allocation.law,
  )  # fmt: skip
  sweep = plan_sweep(base, law, options)
  if not sweep.runs:
    raise ConfigError("no run is possible: " + "; ".join(sweep.left_out[:3]))
  cost = sweep_cost(sweep, values.topology) if values.topology else Cost(sweep.flops)
  if values.out:
    sweep.save(values.out)
  text = format_plan(sweep, cost) + (f"\nwrote    {values.out}" if values.out else "\n--out=FILE writes the plan")
  return show_result(text, sweep.to_json() | {"cost": cost.to_json()}, values.json)


def _allocation(values: flags.FlagValues):
  from deepseek_jax.scaling.allocation import DEEPSEEK, refit_allocation
  from deepseek_jax.scaling.table import read_table

  return refit_allocation(read_table(values.table, values.columns)) if values.table else DEEPSEEK


def _preregister(values: flags.FlagValues) -> int:
  from deepseek_jax.scaling.prediction import add_prediction
  from deepseek_jax.scaling.sweep_plan import load_plan
  from deepseek_jax.scaling.table import read_table

  if not (values.plan and values.out):
    raise ConfigError("--preregister=TABLE needs --plan=FILE, the plan to add the prediction to, and --out=FILE")
  sweep, text = add_prediction(load_plan(values.plan), read_table(values.preregister, values.columns))
  sweep.save(values.out)
  return show_result(f"{text}\nwrote    {values.out}", sweep.prediction or {}, values.json)


def run(argv: list[str]) -> int:
  """The command run."""
  values = flags.FlagValues()
  flags.DEFINE_string("plan", None, "the plan; needed at the first start in a workdir", flag_values=values)
  flags.DEFINE_string(
    "workdir", None, "folder of the sweep, or gs://BUCKET/PATH or s3://BUCKET/PATH", flag_values=values
  )
  flags.DEFINE_string("shard", "1/1", "i/n: part i of n, whose runs no other part has", flag_values=values)
  flags.DEFINE_string("budgets", "", "run these budgets of the plan alone", flag_values=values)
  flags.DEFINE_float("max_minutes", 0.0, "stop after so many minutes, saved; 0: no limit", 0.0, flag_values=values)
  flags.DEFINE_integer("workers", 1, "runs at once on this machine", lower_bound=1, flag_values=values)
  flags.DEFINE_string("worker", "", "i/n: set by --workers for its processes", flag_values=values)
  flags.DEFINE_boolean("dry_run", False, "list the runs and their status, and stop", flag_values=values)
  parse(argv, values, RUN)
  if not values.workdir:
    raise ConfigError("--workdir is required: the folder of the sweep (see --help)")

  from deepseek_jax.scaling import sweep_results, sweep_runs

  sweep = sweep_runs.open_sweep(values.plan, values.workdir)
  budgets = parse_budgets(values.budgets) if values.budgets else ()
  chosen = sweep_runs.select_runs(sweep, budgets, sweep_runs.parse_shard(values.shard))
  if values.dry_run:
    for line in sweep_results.status_lines(sweep, chosen, values.workdir):
      current_console().print(line)
    return 0
  if values.workers > 1 and not values.worker:
    return sweep_runs.run_workers(values.workers, ["run", *argv[1:]])
  if values.worker:
    chosen = sweep_runs.order_for_worker(chosen, sweep_runs.parse_shard(values.worker), values.workdir)

  from deepseek_jax.train import train

  return sweep_runs.run_sweep(sweep, values.workdir, chosen, train, values.max_minutes)


def table(argv: list[str]) -> int:
  """The command table."""
  values = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "folder of the sweep, or its URL", flag_values=values)
  flags.DEFINE_string("out", "-", "the CSV; - for stdout", flag_values=values)
  parse(argv, values, TABLE)
  if not values.workdir:
    raise ConfigError("--workdir is required: the folder of the sweep (see --help)")

  from deepseek_jax.scaling import sweep_runs
  from deepseek_jax.scaling.sweep_results import table_rows
  from deepseek_jax.scaling.table import format_csv

  rows = table_rows(sweep_runs.open_sweep(None, values.workdir), values.workdir)
  write_output(format_csv(rows), values.out, "out")
  if values.out != "-":
    for line in _counts([row["status"] for row in rows]):
      current_console().print(line)
    current_console().print(f"wrote    {values.out}")
  return 0


def _counts(statuses: Sequence[str]) -> Iterator[str]:
  for status in dict.fromkeys(statuses):
    yield f"{status:12} {statuses.count(status)}"
