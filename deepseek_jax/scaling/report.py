"""The report of a table of runs: index.html, which needs no network, and numbers.json with all that it shows."""

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from deepseek_jax.errors import ConfigError, DataError
from deepseek_jax.json_output import to_json_text
from deepseek_jax.scaling import report_charts
from deepseek_jax.scaling.analysis import FitOptions, ScalingFit, fit_table
from deepseek_jax.scaling.budgets import budget_indices
from deepseek_jax.scaling.hparams import HyperparamFit, fit_hyperparams
from deepseek_jax.scaling.isoflop import FrontierFit
from deepseek_jax.scaling.prediction import judge
from deepseek_jax.scaling.sweep_plan import SweepPlan
from deepseek_jax.scaling.table import RunTable
from deepseek_jax.training.page import document, escape, section
from deepseek_jax.training.page import table as html_table

TITLES = {"1": "1, envelope", "2": "2, IsoFLOP", "3": "3, parametric"}
SHOWN = ("run_id", "flops", "M", "params", "tokens", "n_layer", "d_model", "batch_tokens", "lr", "seed", "seconds")


def write_report(
  table: RunTable, out: str | os.PathLike[str], title: str = "Scaling laws", scale: str = "M", bootstrap: int = 1000,
  plan: SweepPlan | None = None,
) -> str:  # fmt: skip
  """Writes OUT/index.html and OUT/numbers.json and returns the page's path.

  Args:
    scale: M, N or N_nonemb.
    plan: whose prediction is judged.

  Raises DataError where no approach can use the table, ConfigError where the folder cannot be written.
  """
  fits, failures = _fits(table, scale, bootstrap)
  if not fits:
    raise DataError("no approach fits: " + "; ".join(f"{name}: {reason}" for name, reason in failures.items()))
  hparams = _hparams(table, bootstrap)
  verdict = judge(plan.prediction, table) if plan and plan.prediction else None
  numbers: dict[str, Any] = {
    "table": os.path.basename(table.path), "rows": len(table), "loss": table.loss_name(), "scale": scale,
    "fits": {name: fit.to_json() for name, fit in fits.items()}, "failures": failures,
    "hparams": hparams.to_json() if hparams else None,
    "prediction": plan.prediction | {"verdict": verdict} if plan and plan.prediction else None,
  }  # fmt: skip
  page = _page(table, title, scale, fits, failures, hparams, numbers["prediction"])
  try:
    os.makedirs(out, exist_ok=True)
    for name, content in (("numbers.json", to_json_text(numbers)), ("index.html", page)):
      path = os.path.join(out, name)
      pathlib.Path(path + ".partial").write_text(content, encoding="utf-8")
      os.replace(path + ".partial", path)
  except OSError as error:
    raise ConfigError(f"--out={out} cannot be written: {error.strerror}") from None
  return os.path.join(out, "index.html")


def _fits(table: RunTable, scale: str, bootstrap: int) -> tuple[dict[str, ScalingFit], dict[str, str]]:
  """Fits of all approaches, and why others have none; each with the largest budget held out where that is possible."""
  fits, failures = {}, {}
  table[table.loss_name()]  # what is wrong with the losses is one error, not one for each approach
  for approach in TITLES:
    try:
      fits[approach] = fit_table(table, FitOptions(approach, scale, bootstrap=bootstrap))
    except DataError as error:
      failures[approach] = str(error)
      continue
    try:
      fits[f"{approach} held out"] = fit_table(
        table, FitOptions(approach, scale, bootstrap=bootstrap, holdout="largest")
      )
    except DataError as error:
      failures[f"{approach} held out"] = str(error)
  return fits, failures


def _hparams(table: RunTable, bootstrap: int) -> HyperparamFit | None:
  try:
    return fit_hyperparams(table, bootstrap=bootstrap)
  except DataError:  # most tables vary neither learning rate nor batch
    return None


def _page(
  table: RunTable, title: str, scale: str, fits: dict[str, ScalingFit], failures: dict[str, str],
  hparams: HyperparamFit | None, prediction: dict[str, Any] | None,
) -> str:  # fmt: skip
  flops = table.flops()
  subtitle = (
    f"{len(table)} runs, {flops.sum():.3g} FLOPs, budgets {flops.min():.3g} to {flops.max():.3g}, scale {scale}, "
    f"{table.loss_name()} · {os.path.basename(table.path)}"
  )
  figures = "".join(
    f"<figure><figcaption><b>{escape(t)}</b> <span>{escape(unit)}</span>{legend}</figcaption>{svg}</figure>"
    for t, unit, legend, svg in report_charts.charts(table, scale, fits, hparams)
  )
  notes = [f"{TITLES[name]}: {line}" for name, fit in fits.items() if name in TITLES for line in fit.diagnostics]
  notes += [f"{name}: no fit: {reason}" for name, reason in failures.items()]
  parts = [
    f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>",
    _tiles(fits, prediction),
    f'<section class="charts">{figures}</section><p class="note">Bands and intervals are 95% of bootstrap samples. Hover over '
    "a dot for its run. All numbers are in numbers.json beside this page.</p>",
    section("Compute-optimal allocation", _allocation_table(fits, scale)),
    section("Held-out prediction of the largest budget", _holdout_table(fits)),
    section("Preregistered prediction", _prediction_table(prediction)) if prediction else "",
    section("Loss as a function of scale and tokens", _parametric_table(fits)),
    section("Learning rate and batch size", _hparam_table(hparams)) if hparams else "",
    section("What to know of these fits", f'<ul class="notes">{"".join(f"<li>{escape(n)}</li>" for n in notes)}</ul>')
    if notes
    else "",
    section("Runs", _runs_table(table)),
  ]
  return document(title, parts, pathlib.Path(__file__).with_suffix(".css").read_text(encoding="utf-8"))


def _interval(interval: Any, spec: str = ".4g") -> str:
  return f"{interval[0]:{spec}} to {interval[1]:{spec}}" if interval else "–"


def _tiles(fits: dict[str, ScalingFit], prediction: dict[str, Any] | None) -> str:
  tiles = []
  for name, fit in fits.items():
    if name in TITLES:
      tiles.append(
        (f"a = {fit.values()['a']:.3f}", f"approach {TITLES[name]}", _interval(fit.intervals().get("a"), ".3f"))
      )
    elif fit.holdout:
      approach = name.partition(" ")[0]
      tiles.append(
        (f"{fit.holdout.error:+.2%}", f"held-out error, approach {approach}", f"at {fit.holdout.flops:.3g} FLOPs")
      )
  if prediction and prediction["verdict"] and prediction["verdict"]["measured"]:
    tiles.append((f"{prediction['verdict']['error']:+.2%}", "preregistered", f"at {prediction['budget']:.3g} FLOPs"))
  cells = [
    f"<div><b>{escape(v)}</b><span>{escape(k)}</span><small>{escape(note)}</small></div>" for v, k, note in tiles
  ]
  return f'<section class="tiles">{"".join(cells)}</section>'


def _allocation_table(fits: dict[str, ScalingFit], scale: str) -> str:
  rows = []
  for name, title in TITLES.items():
    if name in fits:
      fit = fits[name]
      values, intervals = fit.values(), fit.intervals()
      how = fit.fit.interpolation if isinstance(fit.fit, FrontierFit) else "from the surface"
      rows.append([
        title, how, f"{values['a']:.4f}", _interval(intervals.get("a")), f"{values['b']:.4f}", _interval(intervals.get("b")),
        f"{values['G']:.4g}", _interval(intervals.get("G")),
      ])  # fmt: skip
  header = ["approach", "optimum by", f"a of {scale}_opt = G C^a", "95%", "b of D_opt", "95%", "G", "95%"]
  return html_table(header, rows)


def _holdout_table(fits: dict[str, ScalingFit]) -> str:
  rows = []
  for name, fit in fits.items():
    if h := fit.holdout:
      rows.append([
        TITLES[name.partition(" ")[0]], f"{h.flops:.4g}", f"{h.measured:.5f}", f"{h.predicted:.5f}", _interval(h.ci, ".5g"),
        f"{h.error:+.3%}", f"{h.mean_error:.3%} of {h.rows} runs" if h.rows > 1 else "–",
      ])  # fmt: skip
  header = ["approach", "FLOPs", "measured", "predicted", "95%", "error", "mean absolute error"]
  return html_table(header, rows) if rows else ""


def _prediction_table(prediction: dict[str, Any]) -> str:
  verdict = prediction["verdict"]
  rows = [["predicted", f"{prediction['predicted']:.5f} ({_interval(prediction['ci'], '.5g')})"]]
  rows.append(["by approach 3", f"{prediction['approach_3']['predicted']:.5f}"])
  rows.append(["from", f"{prediction['rows']} runs of up to {prediction['largest_fitted']:.4g} FLOPs"])
  rows.append(["budget", f"{prediction['budget']:.4g} FLOPs"])
  if verdict and verdict["measured"] is None:
    rows.append(["measured", f"not judged: {verdict['reason']}"])
  elif verdict:
    inside = {True: "inside the interval", False: "outside the interval", None: ""}[verdict["inside"]]
    rows.append(["measured", f"{verdict['measured']:.5f}, {inside}"])
    rows.append(["error", f"{verdict['error']:+.3%} (approach 3: {verdict['error_of_approach_3']:+.3%})"])
  else:
    rows.append(["measured", "this budget has not run yet"])
  return html_table(["", ""], rows)


def _parametric_table(fits: dict[str, ScalingFit]) -> str:
  if "3" not in fits:
    return ""
  fit = fits["3"]
  values, intervals = fit.values(), fit.intervals()
  names = ["E", "A", "B", "alpha", "beta"]
  return html_table(["", *names], [
    ["value", *(f"{values[n]:.5g}" for n in names)], ["95%", *(_interval(intervals.get(n)) for n in names)],
  ])  # fmt: skip


def _hparam_table(fit: HyperparamFit) -> str:
  rows, fields = [], list(fit.basins[0].best)
  for b in fit.basins:
    row = [f"{b.flops:.4g}", b.near, f"{b.loss:.5f}"]
    for f in fields:
      row += [f"{b.best[f]:.4g}", f"{b.center[f]:.4g}", f"{b.low[f]:.4g} to {b.high[f]:.4g}"]
    rows.append(row)
  header = ["FLOPs", f"runs within {fit.tolerance:.2%}", "smallest loss"]
  header += [f"{f}: {what}" for f in fields for what in ("best run", "vertex", "near-optimal")]
  laws = ""
  if fit.laws:
    texts = [
      f"{f} = {law.coefficient:.4g} C^{law.exponent:.4f} ({_interval(fit.interval(f, 1))})"
      for f, law in fit.laws.items()
    ]
    laws = f'<p class="note">{escape("; ".join(texts))}</p>'
  return html_table(header, rows) + laws


def _runs_table(table: RunTable) -> str:
  names = [name for name in SHOWN if name in table] + [table.loss_name()]
  columns = {name: [row[table.names[name]] for row in table.cells] for name in names}

  def rows() -> Iterator[list[str]]:
    for indices in budget_indices(table):
      for i in indices[np.argsort(table["M"][indices])] if "M" in table else indices:
        yield [_number(columns[name][i]) for name in names]

  return html_table(names, list(rows()))


def _number(text: str) -> str:
  try:
    value = float(text)
  except ValueError:
    return text
  return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e7 else f"{value:.5g}"
