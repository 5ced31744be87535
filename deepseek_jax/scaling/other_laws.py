"""Laws of repeated data and of mixtures of experts, fitted by robust least squares of log loss from several starts."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import least_squares

from deepseek_jax.errors import DataError
from deepseek_jax.scaling.intervals import Interval, percentile_interval
from deepseek_jax.scaling.parametric import DELTA, SAME_OPTIMUM, ParametricOptions, fit_surface
from deepseek_jax.scaling.table import RunTable

Columns = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class LawForm:
  """A law to fit.

  Attributes:
    names: of its parameters.
    positive: those that are fitted as their logarithms.
    columns: what `predict` reads, from a table.
    predict: (values of the parameters, columns) -> loss [rows].
    starts: columns and losses -> starting values, a tuple of the parameters each.
    source: of the formula.
  """

  names: tuple[str, ...]
  positive: tuple[str, ...]
  columns: Callable[[RunTable], Columns]
  predict: Callable[[dict[str, float], Columns], np.ndarray]
  starts: Callable[[Columns, np.ndarray], Sequence[tuple[float, ...]]]
  source: str


@dataclasses.dataclass(frozen=True)
class LawFit:
  """A fitted law: parameters, those of bootstrap samples [k, parameters], and the number of distinct optima within 1%."""

  form: LawForm
  values: dict[str, float]
  samples: np.ndarray | None
  objective: float
  optima: int
  columns: Columns
  losses: np.ndarray

  def predict(self, columns: Columns, ci: float = 0.95) -> tuple[np.ndarray, list[Interval] | None]:
    """(losses [rows], the interval of each) at `columns`."""
    predicted = self.form.predict(self.values, columns)
    if self.samples is None:
      return predicted, None
    drawn = np.array([self.form.predict(dict(zip(self.form.names, row, strict=True)), columns) for row in self.samples])
    return predicted, [percentile_interval(drawn[:, i], ci) for i in range(len(predicted))]

  def interval(self, name: str, ci: float = 0.95) -> Interval | None:
    """Interval of a parameter."""
    return None if self.samples is None else percentile_interval(self.samples[:, self.form.names.index(name)], ci)


def _repeated_columns(table: RunTable) -> Columns:
  return {"n": table.scale("N"), "d": table.tokens(), "unique": np.minimum(table["unique_tokens"], table.tokens())}


def _predict_repeated(p: dict[str, float], c: Columns) -> np.ndarray:
  """L = E + A / N'^alpha + B / D'^beta, where repeated tokens and excess parameters count less and less."""
  unique, repeats = c["unique"], c["d"] / c["unique"] - 1
  d = unique * (1 + p["R_D"] * -np.expm1(-repeats / p["R_D"]))
  g = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"]))
  b = p["alpha"] / (p["alpha"] + p["beta"])
  base = np.minimum(g * (unique * g) ** ((1 - b) / b), c["n"])  # the optimal parameters for the unique tokens
  excess = c["n"] / base - 1
  n = base * (1 + p["R_N"] * -np.expm1(-excess / p["R_N"]))
  return p["E"] + p["A"] / n ** p["alpha"] + p["B"] / d ** p["beta"]


def _repeated_starts(c: Columns, losses: np.ndarray) -> Sequence[tuple[float, ...]]:
  once = c["d"] <= 1.01 * c["unique"]
  rows = once if once.sum() >= 6 else np.ones(len(losses), bool)
  s = fit_surface(c["n"][rows], c["d"][rows], losses[rows], ParametricOptions(), bootstrap=0).surface
  surface = (s.E, s.A, s.B, s.alpha, s.beta)
  return [(*surface, r_d, r_n) for r_d, r_n in itertools.product((1.0, 4.0, 15.0, 50.0), (1.0, 5.0, 25.0))]


def _moe_columns(table: RunTable) -> Columns:
  return {"n": table.scale("N"), "d": table.tokens(), "experts": table["experts"]}


def _saturated(experts: np.ndarray, start: float, most: float) -> np.ndarray:
  """The effective number of experts, which saturates at `most` (Clark et al., eq. 7)."""
  return 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / most)) + 1 / most)


def _predict_clark(p: dict[str, float], c: Columns) -> np.ndarray:
  log_n = np.log10(c["n"])
  log_e = np.log10(_saturated(np.maximum(c["experts"], 1), p["E_start"], p["E_start"] + p["E_span"]))
  return 10 ** (p["a"] * log_n + p["b"] * log_e + p["c"] * log_n * log_e + p["d"])


def _clark_starts(c: Columns, losses: np.ndarray) -> Sequence[tuple[float, ...]]:
  slope, level = np.polyfit(np.log10(c["n"]), np.log10(losses), 1)
  return [(slope, b, 0.0, level, s, m) for b in (-0.02, -0.1) for s in (1.2, 2.0) for m in (50.0, 500.0)]


def _predict_ludziejewski(p: dict[str, float], c: Columns) -> np.ndarray:
  experts = _saturated(np.maximum(c["experts"], 1), p["E_start"], p["E_start"] + p["E_span"])
  log_e = np.log(experts)
  of_n = p["A"] * experts ** p["delta"] * c["n"] ** (p["alpha"] + p["gamma"] * log_e)
  of_d = p["B"] * experts ** p["omega"] * c["d"] ** (p["beta"] + p["zeta"] * log_e)
  return of_n + of_d + p["E"]


def _ludziejewski_starts(c: Columns, losses: np.ndarray) -> Sequence[tuple[float, ...]]:
  # Around the published values: A, delta, alpha, gamma, B, omega, beta, zeta, E, then those of the saturation.
  s = fit_surface(c["n"], c["d"], losses, ParametricOptions(), bootstrap=0).surface
  fitted = (s.A, 0.0, -s.alpha, 0.0, s.B, 0.0, -s.beta, 0.0, s.E)
  published = (35.91, 0.2285, -0.1889, -0.0098, 35.98, -0.5529, -0.1775, 0.0259, 1.3637)
  return [(*x, start, most) for x in (fitted, published) for start in (1.2, 2.0) for most in (50.0, 500.0)]


LAWS: dict[str, LawForm] = {
  "repeated": LawForm(
    ("E", "A", "B", "alpha", "beta", "R_D", "R_N"), ("E", "A", "B", "alpha", "beta", "R_D", "R_N"), _repeated_columns,
    _predict_repeated, _repeated_starts, "Muennighoff et al., arXiv 2305.16264",
  ),
  "clark": LawForm(
    ("a", "b", "c", "d", "E_start", "E_span"), ("E_start", "E_span"), _moe_columns, _predict_clark, _clark_starts,
    "Clark et al., arXiv 2202.01169",
  ),
  "ludziejewski": LawForm(
    ("A", "delta", "alpha", "gamma", "B", "omega", "beta", "zeta", "E", "E_start", "E_span"),
    ("A", "B", "E", "E_start", "E_span"), _moe_columns, _predict_ludziejewski, _ludziejewski_starts,
    "Ludziejewski et al., arXiv 2502.05172",
  ),
}  # fmt: skip


def fit_law(form: LawForm, table: RunTable, bootstrap: int = 200, delta: float = DELTA, seed: int = 0) -> LawFit:
  """Fits `form` to the losses of a table: Huber's loss of log residuals, from all starts of the form.

  Raises DataError: a column is missing, or there are fewer runs than parameters.
  """
  columns, losses = form.columns(table), table[table.loss_name()]
  if len(losses) <= len(form.names):
    raise DataError(f"{table.path}: {len(losses)} runs for {len(form.names)} parameters of {form.source}: add runs")
  logs = np.array([name in form.positive for name in form.names])

  def residuals(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
      values = dict(zip(form.names, np.where(logs, np.exp(np.minimum(x, 80.0)), x), strict=True))
      off = np.log(form.predict(values, {name: column[rows] for name, column in columns.items()}) / losses[rows])
    return np.where(np.isfinite(off), off, 1e3)

  def minimize(start: np.ndarray, rows: np.ndarray, evaluations: int):
    return least_squares(
      residuals,
      start,
      args=(rows,),
      loss="huber",
      f_scale=delta,
      x_scale="jac",
      max_nfev=evaluations,
      ftol=1e-14,
      xtol=1e-14,
    )

  every = np.arange(len(losses))
  results = []
  for start in form.starts(columns, losses):
    x = np.where(logs, np.log(np.maximum(start, 1e-300)), start)
    # Levenberg-Marquardt without the robust loss finds the basin; the robust one starts there.
    near = least_squares(residuals, x, args=(every,), x_scale="jac", max_nfev=400)
    results.append(minimize(near.x, every, 2000))
  results.sort(key=lambda r: r.cost)
  best = results[0]

  def to_values(x: np.ndarray) -> np.ndarray:
    return np.where(logs, np.exp(x), x)

  optima: list[np.ndarray] = []
  for result in results:
    close = result.cost <= best.cost * (1 + SAME_OPTIMUM) + 1e-12
    values = to_values(result.x)
    if close and all(np.abs(values - o).max() > 0.05 * np.abs(o).max() for o in optima):
      optima.append(values)
  samples = None
  if bootstrap:
    generator = np.random.default_rng(seed)
    drawn = [minimize(best.x, generator.integers(len(losses), size=len(losses)), 200).x for _ in range(bootstrap)]
    samples = np.array([to_values(x) for x in drawn])
  parameters = dict(zip(form.names, to_values(best.x).tolist(), strict=True))
  return LawFit(form, parameters, samples, float(best.cost), len(optima), columns, losses)


def fit_repeated_data(table: RunTable, bootstrap: int = 200) -> LawFit:
  """The law of repeated data (Muennighoff et al.): R_D and R_N tell how fast more epochs and more parameters lose value."""
  return fit_law(LAWS["repeated"], table, bootstrap)


def fit_moe(table: RunTable, form: str = "ludziejewski", bootstrap: int = 200) -> LawFit:
  """A law of mixtures of experts: `form` is clark or ludziejewski. Raises DataError."""
  if form not in ("clark", "ludziejewski"):
    raise DataError(f"form={form!r}: expected clark or ludziejewski")
  return fit_law(LAWS[form], table, bootstrap)
