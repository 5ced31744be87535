"""A fit of a table, as the command line gives it: with what is held out, diagnostics, and forms for people and programs."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from deepseek_jax.errors import DataError
from deepseek_jax.scaling.budgets import best_of_each_run, budget_indices
from deepseek_jax.scaling.intervals import Interval, percentile_interval
from deepseek_jax.scaling.isoflop import (
  INTERPOLATIONS,
  LEAST_SIZES,
  FrontierFit,
  budget_profiles,
  fit_envelope,
  fit_isoflop,
)
from deepseek_jax.scaling.other_laws import LAWS, LawFit, fit_law
from deepseek_jax.scaling.parametric import NAMES, ParametricFit, ParametricOptions, Surface, fit_parametric
from deepseek_jax.scaling.table import RunTable, flops_per_scale

APPROACHES = ("1", "2", "3", *LAWS)
MOST_EPOCHS = 4  # repeated data counts nearly as new up to here (Muennighoff et al.)
MOST_EXTRAPOLATION = 10
LEAST_INFLUENCE = 1e-3  # of a run or a budget on an exponent, below which it is not told
WIDE = 100  # a parameter whose interval spans more than this factor is unbounded


@dataclasses.dataclass(frozen=True)
class FitOptions:
  """What `fit_table` does.

  Attributes:
    approach: one of APPROACHES.
    scale: M, N or N_nonemb.
    interpolation: of approach 2.
    bootstrap: number of samples; 0: no intervals.
    holdout: "largest" budget, FLOPs from which on runs are held out, or "" for none.
    parametric: of approach 3.
  """

  approach: str = "3"
  scale: str = "M"
  interpolation: str = "auto"
  bootstrap: int = 1000
  holdout: str = ""
  parametric: ParametricOptions = ParametricOptions()
  ci: float = 0.95
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """A prediction of runs that were not fitted. `error`: predicted / measured - 1, of the best of them.

  Approaches 1 and 2 predict the optimum of the largest budget. Approach 2 measures it as the vertex of the runs that are held
  out, where these are enough.

  Attributes:
    mean_error: mean of the absolute errors of `rows` runs; of approaches 1 and 2 that of the optimum, and rows is 1.
  """

  flops: float
  measured: float
  predicted: float
  ci: Interval | None
  error: float
  mean_error: float
  rows: int


@dataclasses.dataclass(frozen=True)
class ScalingFit:
  """A fit with what is known about it."""

  options: FitOptions
  loss_name: str
  rows: int
  fit: ParametricFit | FrontierFit | LawFit
  holdout: HeldOut | None
  diagnostics: tuple[str, ...]

  @property
  def num_samples(self) -> int:
    """Number of bootstrap samples."""
    samples = self.fit.samples
    return 0 if samples is None else samples.E.size if isinstance(samples, Surface) else len(samples)

  def values(self) -> dict[str, float]:
    """Fitted parameters by name."""
    fit, c = self.fit, flops_per_scale(self.options.scale)
    if isinstance(fit, ParametricFit):
      named = {name: float(getattr(fit.surface, name)) for name in NAMES}
      return named | {"a": float(fit.surface.a), "b": float(fit.surface.b), "G": float(fit.surface.coefficient(c))}
    if isinstance(fit, FrontierFit):
      return {"a": fit.a, "b": fit.b, "G": fit.G, "G_tokens": fit.G_tokens}
    return fit.values

  def intervals(self) -> dict[str, Interval]:
    """Intervals of the parameters; {} without bootstrap samples."""
    fit, ci, c = self.fit, self.options.ci, flops_per_scale(self.options.scale)
    if fit.samples is None:
      return {}
    if isinstance(fit, ParametricFit):
      s = fit.samples
      named = {name: getattr(s, name) for name in (*NAMES, "a", "b")} | {"G": s.coefficient(c)}
      return {name: percentile_interval(np.asarray(values), ci) for name, values in named.items()}
    if isinstance(fit, FrontierFit):
      a, b, g, g_tokens = fit.samples[:, :4].T
      columns = {"a": a, "b": b, "G": np.exp(g), "G_tokens": np.exp(g_tokens)}
      return {name: percentile_interval(column, ci) for name, column in columns.items()}
    return {name: percentile_interval(fit.samples[:, i], ci) for i, name in enumerate(fit.form.names)}

  def predict(self, n: float, d: float, ci: float = 0.95) -> tuple[float, Interval | None]:
    """(loss, its interval) at scale `n` and `d` tokens. Raises DataError for an approach that tells optima alone."""
    if not isinstance(self.fit, ParametricFit):
      raise DataError(f"approach {self.options.approach} predicts no loss of a scale and tokens: use approach 3")
    return self.fit.predict(n, d, ci)

  def optimal(self, flops: float, ci: float = 0.95) -> tuple[float, Interval | None]:
    """(compute-optimal scale, its interval) of a budget. Raises DataError for a law of another kind."""
    if isinstance(self.fit, LawFit):
      raise DataError(f"approach {self.options.approach} gives no optimal allocation: use 1, 2 or 3")
    return self.fit.optimal(flops, ci)

  def to_json(self) -> dict[str, Any]:
    """The content of fit --json."""
    options = self.options
    tree: dict[str, Any] = {
      "approach": int(options.approach) if options.approach.isdigit() else options.approach, "scale": options.scale,
      "loss": self.loss_name, **self.values(), "ci": self.intervals(), "rows": self.rows, "bootstrap": self.num_samples,
      "diagnostics": list(self.diagnostics),
    }  # fmt: skip
    if isinstance(self.fit, FrontierFit):
      tree |= {"interpolation": self.fit.interpolation, "noise": self.fit.noise}
      tree["vertices"] = [dataclasses.asdict(v) for v in self.fit.vertices]
    else:
      tree |= {"objective": self.fit.objective, "optima": self.fit.optima}
    if isinstance(self.fit, LawFit):
      tree["source"] = self.fit.form.source
    if self.holdout:
      tree["holdout"] = dataclasses.asdict(self.holdout)
    return tree

  def lines(self) -> Iterator[str]:
    """The fit for people."""
    options, intervals = self.options, self.intervals()
    yield f"approach {options.approach}, scale {options.scale}, {self.loss_name} of {self.rows} runs" + (
      f", vertices by {self.fit.interpolation}" if isinstance(self.fit, FrontierFit) else ""
    )
    yield f"{'':10} {'value':>12}" + (
      f"   {options.ci:.0%} interval of {self.num_samples} samples" if intervals else ""
    )
    for name, value in self.values().items():
      low, high = intervals.get(name, (np.nan, np.nan))
      yield f"{name:10} {value:12.5g}" + (f"   {low:.5g} to {high:.5g}" if name in intervals else "")
    if isinstance(self.fit, FrontierFit):
      yield f"{'FLOPs':>10} {options.scale + '_opt':>12} {'tokens':>12} {'loss':>9}"
      for v in self.fit.vertices:
        edge = "   at the edge: not fitted" if v.is_edge else ""
        yield f"{v.flops:10.3g} {v.scale:12.4g} {v.tokens:12.4g} {v.loss:9.5f}{edge}"
    if self.holdout:
      h = self.holdout
      interval = f" ({h.ci[0]:.5f} to {h.ci[1]:.5f})" if h.ci else ""
      yield (
        f"held out   {h.flops:.4g} FLOPs: predicted {h.predicted:.5f}{interval}, measured {h.measured:.5f}, "
        f"error {h.error:+.3%}" + (f"; mean of {h.rows} runs {h.mean_error:.3%}" if h.rows > 1 else "")
      )
    yield from (f"note       {line}" for line in self.diagnostics)


def fit_table(table: RunTable, options: FitOptions) -> ScalingFit:
  """Fits a table. Raises DataError for a table that the approach cannot use."""
  if options.approach not in APPROACHES:
    raise DataError(f"--approach={options.approach}: expected one of {', '.join(APPROACHES)}")
  fitted, held = split_holdout(table, options.holdout)
  smallest, floor = float(table[table.loss_name()].min()), options.parametric.fixed_E
  if floor is not None and floor >= smallest:
    raise DataError(f"--fixed_E={floor:g} is not below the smallest loss, {smallest:g}: no run could have it")
  fit: ParametricFit | FrontierFit | LawFit
  if options.approach in LAWS and options.scale != "N":
    raise DataError(
      f"--scale={options.scale} with --approach={options.approach}, which is a law of N, the parameters: --scale=N"
    )
  if options.approach == "1":
    fit = fit_envelope(fitted, options.scale, options.bootstrap, options.seed)
  elif options.approach == "2":
    fit = fit_isoflop(fitted, options.scale, options.interpolation, options.bootstrap, options.seed)
  elif options.approach == "3":
    fit = fit_parametric(fitted, options.scale, options.parametric, options.bootstrap, options.seed)
  else:
    fit = fit_law(LAWS[options.approach], fitted, min(options.bootstrap, 200), options.parametric.delta, options.seed)
  diagnostics = [*_fit_diagnostics(fit, fitted), *_table_diagnostics(fitted, held, options)]
  holdout = _predict_holdout(fit, held, options) if held else None
  return ScalingFit(options, table.loss_name(), len(fitted), fit, holdout, tuple(diagnostics))


def split_holdout(table: RunTable, holdout: str) -> tuple[RunTable, RunTable | None]:
  """(rows to fit, rows that are held out). Raises DataError for a `holdout` that leaves nothing on a side."""
  if not holdout:
    return table, None
  if holdout == "largest":
    held = budget_indices(table)[-1]
  else:
    try:
      held = np.flatnonzero(table.flops() >= float(holdout))
    except ValueError:
      raise DataError(f"--holdout={holdout}: expected largest, or FLOPs from which on runs are held out") from None
  kept = np.setdiff1d(np.arange(len(table)), held)
  if not len(held) or not len(kept):
    raise DataError(
      f"--holdout={holdout}: of {len(table)} runs it holds out {len(held)}; one at least must be on each side"
    )
  return table.take(kept), table.take(held)


def _predict_holdout(fit: ParametricFit | FrontierFit | LawFit, held: RunTable, options: FitOptions) -> HeldOut:
  if isinstance(fit, FrontierFit):
    flops, measured = _held_optimum(fit, held, options.scale)
    predicted, interval = fit.predict(flops, options.parametric.fixed_E, options.ci)
    error = float(predicted / measured - 1)
    return HeldOut(flops, measured, predicted, interval, error, abs(error), 1)
  if isinstance(fit, ParametricFit):
    scales, tokens, losses, _ = best_of_each_run(held, options.scale)
    every_flops = fit.per_scale * scales * tokens
    everything = np.asarray(fit.surface.loss(scales, tokens))
    best = int(losses.argmin())
    predicted, interval = fit.predict(float(scales[best]), float(tokens[best]), options.ci)
  else:
    losses, every_flops = held[held.loss_name()], held.flops()
    everything, intervals = fit.predict(fit.form.columns(held), options.ci)
    best = int(losses.argmin())
    predicted, interval = float(everything[best]), intervals[best] if intervals else None
  errors = everything / losses - 1
  return HeldOut(
    float(every_flops[best]), float(losses[best]), predicted, interval, float(errors[best]), float(np.abs(errors).mean()),
    len(losses),
  )  # fmt: skip


def _held_optimum(fit: FrontierFit, held: RunTable, scale: str) -> tuple[float, float]:
  """(FLOPs, loss) of the optimum of the largest budget that is held out."""
  profile = budget_profiles(held, scale)[-1]
  find = INTERPOLATIONS.get(fit.interpolation)
  vertex = find(profile) if find and len(profile.scales) >= LEAST_SIZES else None
  return profile.flops, vertex.loss if vertex and not vertex.is_edge else float(profile.losses.min())


def _fit_diagnostics(fit: ParametricFit | FrontierFit | LawFit, table: RunTable) -> Iterator[str]:
  if isinstance(fit, FrontierFit):
    edges = [v.flops for v in fit.vertices if v.is_edge]
    if edges:
      yield (
        f"edge vertices: at {', '.join(f'{f:.3g}' for f in edges)} FLOPs the best size is the smallest or largest: add sizes "
        "there; these budgets are not fitted"
      )
    if fit.noise is None:
      yield "no intervals: the noise of a loss is not known; add seeds, or five sizes within 4 times the best of a budget"
    if sum(not v.is_edge for v in fit.vertices) < 3:
      yield "two budgets: the exponent has no residual to judge it by, and losses of others are predicted with the E of approach 3"
    yield from _influential_budgets(fit)
    return
  if fit.optima > 1:
    yield f"several optima: {fit.optima} differ and are within 1% of the best objective: the data do not tell them apart"
  if isinstance(fit, ParametricFit):
    yield from _unbounded(fit)
    off = np.abs(fit.without_each_run() - fit.surface.a)
    if len(fit.rows) < len(table):
      yield f"{len(table) - len(fit.rows)} runs count with others of the same model and FLOPs: means of seeds, best settings"
    rows = [str(fit.rows[i]) for i in np.argsort(-off) if off[i] > max(standard_error_without(off, i), LEAST_INFLUENCE)]
    if rows:
      yield (
        f"influence: without row {', '.join(rows)} the exponent moves by more than the standard error that the other rows give "
        "it: look at these runs"
      )


def standard_error_without(off: np.ndarray, i: int) -> float:
  """The jackknife's standard error of a value that moves by `off` without each row, of all rows but row `i`."""
  others = np.delete(off, i)
  return float(np.sqrt(np.square(others).sum() * (len(off) - 1) / len(off)))


def _influential_budgets(fit: FrontierFit) -> Iterator[str]:
  inside = [v for v in fit.vertices if not v.is_edge]
  if len(inside) < 4:
    return
  log_c, log_n = np.log([v.flops for v in inside]), np.log([v.scale for v in inside])
  kept = [np.arange(len(inside)) != i for i in range(len(inside))]
  without = np.array([np.polyfit(log_c[others], log_n[others], 1)[0] for others in kept])
  off = np.abs(without - fit.a)
  for i, v in enumerate(inside):
    if off[i] > max(standard_error_without(off, i), LEAST_INFLUENCE):
      yield f"influence: without {v.flops:.3g} FLOPs the exponent moves from {fit.a:.4f} to {without[i]:.4f}: look at its runs"


def _unbounded(fit: ParametricFit) -> Iterator[str]:
  s, least = fit.surface, float(fit.losses.min())
  wrong = []
  if fit.options.fixed_E is None and s.E < 1e-3 * least:
    wrong.append("E is 0")
  wrong += [f"{name} is {getattr(s, name):.3g}" for name in ("alpha", "beta") if not 0.01 < getattr(s, name) < 3]
  if fit.samples is not None:
    for name in NAMES:
      low, high = percentile_interval(np.asarray(getattr(fit.samples, name)))
      if low <= 0 or high / low > WIDE:
        wrong.append(f"the interval of {name} is {low:.3g} to {high:.3g}")
  if wrong:
    yield f"unbounded parameters: {', '.join(wrong)}: the runs do not tell them; fix E (--fixed_E), or add runs"


def _table_diagnostics(fitted: RunTable, held: RunTable | None, options: FitOptions) -> Iterator[str]:
  if held is not None:
    factor = held.flops().max() / fitted.flops().max()
    if factor > MOST_EXTRAPOLATION:
      yield f"extrapolation: held-out runs have up to {factor:.3g} times the compute of the largest fitted one"
  unique = fitted.optional("unique_tokens")
  if unique is not None and options.approach != "repeated":
    epochs = fitted.tokens() / unique
    if (epochs > MOST_EPOCHS).any():
      yield (
        f"repeated data: {(epochs > MOST_EPOCHS).sum()} runs see their data more than {MOST_EPOCHS} times, at most "
        f"{epochs.max():.1f}: fit --approach=repeated"
      )
