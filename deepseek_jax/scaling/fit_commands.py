"""The commands that read a table of runs: fit, hparams and report."""

import math

from absl import flags

from deepseek_jax.console import current_console
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import parse
from deepseek_jax.json_output import show_result

FIT = """Fits scaling laws to a table of runs, ours or other people's:

  python -m deepseek_jax.scaling fit --table=runs.csv --approach=2 --scale=M
  python -m deepseek_jax.scaling fit --table=theirs.csv --columns="params=n,tokens=d,loss=final_loss" --approach=3 --scale=N --holdout=largest

Approaches: 1 envelope, 2 IsoFLOP profiles, 3 E + A / N^alpha + B / D^beta; repeated (data), clark and ludziejewski (mixtures of
experts). A row is a run; rows whose column status is not "finished" are left out."""

HPARAMS = """Fits power laws of learning rate and batch size over compute to runs that vary them:

  python -m deepseek_jax.scaling hparams --table=runs.csv --tolerance=0.0025 --json=law.json

plan --law=law.json plans with them."""

REPORT = """Writes one HTML page, readable offline, and its numbers as JSON beside it:

  python -m deepseek_jax.scaling report --table=runs.csv --out=report/ --plan=sweep.json"""


def _table_flags(*more: tuple[str, str | None, str]) -> flags.FlagValues:
  values = flags.FlagValues()
  for name, default, doc in (
    ("table", None, "the CSV of runs"),
    ("columns", "", "names of its columns: flops=C,loss=final_loss"),
    ("where", "", "only rows with these values: warmup=short,decay=const"),
    *more,
  ):
    flags.DEFINE_string(name, default, doc, flag_values=values)
  return values


def _define_scale(values: flags.FlagValues) -> None:
  doc = "model scale: columns M, params or params_nonembedding (default: the first that the table has)"
  flags.DEFINE_enum("scale", None, ["M", "N", "N_nonemb"], doc, flag_values=values)


def _read(values: flags.FlagValues, min_rows: int = 3):
  from deepseek_jax.scaling.table import read_table

  if not values.table:
    raise ConfigError("--table is required: a CSV with a row for each run (see --help)")
  return read_table(values.table, values.columns, values.where, min_rows)


JSON = ("json", None, "also write the numbers to this file; - for stdout, and nothing else")


def fit(argv: list[str]) -> int:
  """The command fit."""
  values = _table_flags(
    ("prior_E", "", "approach 3: mean and standard deviation of a normal prior of E: 1.7,0.1"),
    ("holdout", "", "runs to predict instead of fitting: largest (budget), or FLOPs from which on"),
    ("approach", "3", "1, 2, 3, repeated, clark or ludziejewski"),
    JSON,
  )
  _define_scale(values)
  flags.DEFINE_enum(
    "interpolation", "auto", ["auto", "akima", "parabola"], "approach 2: auto takes the one that tells left-out sizes better",
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_integer("bootstrap", 1000, "bootstrap samples; 0: no intervals", lower_bound=0, flag_values=values)
  flags.DEFINE_float("ci", 0.95, "probability of the intervals", flag_values=values)
  flags.DEFINE_float("delta", 1e-3, "approach 3: of Huber's loss of log residuals", flag_values=values)
  flags.DEFINE_float("fixed_E", 0.0, "approach 3: the irreducible loss, instead of fitting it", flag_values=values)
  flags.DEFINE_enum(
    "objective", "huber", ["huber", "squares"], "approach 3: Huber's loss of log residuals, or squares of the loss's",
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_boolean("tied", False, "approach 3: alpha = beta", flag_values=values)
  flags.DEFINE_integer("seed", 0, "of the bootstrap", lower_bound=0, flag_values=values)
  parse(argv, values, FIT)

  from deepseek_jax.scaling.analysis import FitOptions, fit_table
  from deepseek_jax.scaling.other_laws import LAWS
  from deepseek_jax.scaling.parametric import ParametricOptions

  parametric = ParametricOptions(
    fixed_E=_positive("fixed_E", values.fixed_E) if values["fixed_E"].present else None,
    prior_E=_prior(values.prior_E), tied=values.tied, delta=_positive("delta", values.delta),
    objective=values.objective,
  )  # fmt: skip
  if not 0 < values.ci < 1:
    raise ConfigError(f"--ci={values.ci}: expected a probability between 0 and 1")
  table = _read(values)
  default = "N" if values.approach in LAWS else table.default_scale()
  options = FitOptions(
    values.approach,
    values.scale or default,
    values.interpolation,
    values.bootstrap,
    values.holdout,
    parametric,
    values.ci,
    values.seed,
  )
  result = fit_table(table, options)
  return show_result("\n".join(result.lines()), result.to_json(), values.json)


def _positive(name: str, value: float) -> float:
  if not 0 < value < math.inf:
    raise ConfigError(f"--{name}={value}: expected a positive number")
  return value


def _prior(text: str) -> tuple[float, float] | None:
  if not text:
    return None
  try:
    mean, deviation = (float(part) for part in text.split(","))
  except ValueError:
    raise ConfigError(f"--prior_E={text}: expected MEAN,DEVIATION, as 1.7,0.1") from None
  return _positive("prior_E", mean), _positive("prior_E", deviation)


def hparams(argv: list[str]) -> int:
  """The command hparams."""
  values = _table_flags(JSON)
  flags.DEFINE_float("tolerance", 0.0025, "near-optimal: within this fraction of the smallest loss", flag_values=values)
  flags.DEFINE_integer("bootstrap", 1000, "bootstrap samples; 0: no intervals", lower_bound=0, flag_values=values)
  parse(argv, values, HPARAMS)

  from deepseek_jax.scaling.hparams import fit_hyperparams

  result = fit_hyperparams(_read(values), values.tolerance, values.bootstrap)
  fields = list(result.basins[0].best)
  lines = [
    f"{'FLOPs':>10} {'runs near':>9}   " + "   ".join(f"{f + ': best, center, near-optimal':44}" for f in fields)
  ]
  for b in result.basins:
    cells = [f"{b.best[f]:.4g}, {b.center[f]:.4g}, {b.low[f]:.4g} to {b.high[f]:.4g}" for f in fields]
    lines.append(f"{b.flops:10.3g} {b.near:9}   " + "   ".join(f"{cell:44}" for cell in cells))
  for field in fields:
    if result.laws:
      law, low_high = result.laws[field], result.interval(field, 1)
      interval = f" ({low_high[0]:.4f} to {low_high[1]:.4f})" if low_high else ""
      lines.append(f"{field:12} {law.coefficient:.5g} C^{law.exponent:.4f}{interval}")
  lines += [f"note         {line}" for line in result.diagnostics()]
  return show_result("\n".join(lines), result.to_json(), values.json)


def report(argv: list[str]) -> int:
  """The command report."""
  values = _table_flags(
    ("out", None, "the folder to write: index.html, and numbers.json"),
    ("plan", None, "the plan of the sweep, whose prediction is judged"),
    ("title", "Scaling laws", "of the page"),
  )
  _define_scale(values)
  flags.DEFINE_integer("bootstrap", 1000, "bootstrap samples", lower_bound=0, flag_values=values)
  parse(argv, values, REPORT)
  if not values.out:
    raise ConfigError("--out is required: the folder of the report (see --help)")
  table = _read(values)

  from deepseek_jax.scaling.report import write_report
  from deepseek_jax.scaling.sweep_plan import load_plan

  sweep = load_plan(values.plan) if values.plan else None
  path = write_report(table, values.out, values.title, values.scale or table.default_scale(), values.bootstrap, sweep)
  current_console().print(f"report   {path}")
  return 0
