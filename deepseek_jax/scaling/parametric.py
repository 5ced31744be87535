"""Approach 3: the loss as a function of model scale and tokens, L = E + A / N^alpha + B / D^beta (Chinchilla, section 3.3)."""

import dataclasses
import itertools
from typing import Any

import numpy as np

from deepseek_jax.errors import DataError
from deepseek_jax.scaling.batched_bfgs import minimize
from deepseek_jax.scaling.budgets import best_of_each_run
from deepseek_jax.scaling.intervals import Interval, percentile_interval
from deepseek_jax.scaling.table import RunTable, flops_per_scale

Number = Any  # a float, or an array of them: one for each bootstrap sample or run
DELTA = 1e-3  # of Huber's loss of residuals in log loss, as in Chinchilla
# Chinchilla's grid of starts: log A, log B, log E, alpha, beta. 4,500 of them.
START_GRID = (
  tuple(range(0, 26, 5)), tuple(range(0, 26, 5)), (-1.0, -0.5, 0.0, 0.5, 1.0), (0.0, 0.5, 1.0, 1.5, 2.0),
  (0.0, 0.5, 1.0, 1.5, 2.0),
)  # fmt: skip
NAMES = ("E", "A", "B", "alpha", "beta")
SAME_OPTIMUM = 0.01  # values this near to the best one are reported
POLISHED = 60  # of the starts, those that are minimized to the end


@dataclasses.dataclass(frozen=True)
class Surface:
  """L = E + A / N^alpha + B / D^beta, or many of them as arrays [k]."""

  E: Number
  A: Number
  B: Number
  alpha: Number
  beta: Number

  def loss(self, n: Number, d: Number) -> Number:
    """The loss at scale `n` and `d` tokens."""
    with np.errstate(all="ignore"):  # bootstrap samples of a table that does not tell a parameter go anywhere
      return self.E + self.A / n**self.alpha + self.B / d**self.beta

  @property
  def a(self) -> Number:
    """The exponent of N_opt = G C^a."""
    with np.errstate(all="ignore"):
      return self.beta / (self.alpha + self.beta)

  @property
  def b(self) -> Number:
    """The exponent of D_opt."""
    with np.errstate(all="ignore"):
      return self.alpha / (self.alpha + self.beta)

  def coefficient(self, per_scale: float) -> Number:
    """G of N_opt = G C^a, where C = per_scale * N * D: 6 for parameters, 1 for M."""
    with np.errstate(all="ignore"):
      ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
      return ratio * per_scale**-self.a

  def optimal(self, flops: Number, per_scale: float) -> Number:
    """The compute-optimal scale of a budget."""
    with np.errstate(all="ignore"):
      return self.coefficient(per_scale) * flops**self.a


@dataclasses.dataclass(frozen=True)
class ParametricOptions:
  """What of the surface is given rather than fitted.

  Attributes:
    fixed_E: the irreducible loss; None: fitted.
    prior_E: (mean, standard deviation) of a normal prior; None: none. Fits with a free E extrapolate too optimistically.
    tied: alpha = beta, as Gadre et al. (arXiv 2403.08540) fit.
    delta: of Huber's loss.
    objective: huber, the sum of Huber's loss of residuals in log loss (Chinchilla); squares, of the squared residuals of the
      loss (Gadre et al.).
  """

  fixed_E: float | None = None
  prior_E: tuple[float, float] | None = None
  tied: bool = False
  delta: float = DELTA
  objective: str = "huber"

  @property
  def num_parameters(self) -> int:
    """Fitted parameters."""
    return 5 - (self.fixed_E is not None) - self.tied


@dataclasses.dataclass(frozen=True)
class ParametricFit:
  """A fitted surface.

  Attributes:
    samples: the surfaces of bootstrap samples, as arrays; None: there are none.
    objective: the summed Huber loss over DELTA^2 at the optimum.
    optima: number of distinct optima within 1% of the best one.
    per_scale: C = per_scale * N * D.
  """

  surface: Surface
  samples: Surface | None
  objective: float
  optima: int
  per_scale: float
  n: np.ndarray
  d: np.ndarray
  losses: np.ndarray
  options: ParametricOptions
  rows: tuple[int, ...] = ()  # of the table's file, of each fitted run

  def predict(self, n: float, d: float, ci: float = 0.95) -> tuple[float, Interval | None]:
    """(loss, its interval) at scale `n` and `d` tokens."""
    interval = percentile_interval(self.samples.loss(n, d), ci) if self.samples else None
    return float(self.surface.loss(n, d)), interval

  def optimal(self, flops: float, ci: float = 0.95) -> tuple[float, Interval | None]:
    """(compute-optimal scale, its interval) of a budget."""

    def optimum(surface):
      return surface.optimal(flops, self.per_scale)

    interval = percentile_interval(optimum(self.samples), ci) if self.samples else None
    return float(optimum(self.surface)), interval

  def loss_at_optimum(self, flops: float, ci: float = 0.95) -> tuple[float, Interval | None]:
    """(loss, its interval) of the compute-optimal allocation of a budget."""

    def optimum(surface):
      n = surface.optimal(flops, self.per_scale)
      with np.errstate(all="ignore"):
        return surface.loss(n, flops / (self.per_scale * n))

    interval = percentile_interval(optimum(self.samples), ci) if self.samples else None
    return float(optimum(self.surface)), interval

  def without_each_run(self) -> np.ndarray:
    """The exponent a of the fits that leave one run out each: [rows]."""
    problem = _Problem(self.n, self.d, self.losses, self.options)
    start = problem.centered(self.surface)
    weights = 1.0 - np.eye(len(self.n))
    x, _ = minimize(problem.objective(weights), np.repeat(start[None], len(self.n), 0), 200, 1e-10)
    return np.asarray(problem.surface(x).a)

  def residuals(self) -> np.ndarray:
    """log(predicted / measured) of each run."""
    return np.log(self.surface.loss(self.n, self.d) / self.losses)


class _Problem:
  """The objective of a fit, on centred log N and log D: A and B are then the terms in the middle of the data."""

  def __init__(self, n: np.ndarray, d: np.ndarray, losses: np.ndarray, options: ParametricOptions):
    self.options = options
    log_n, log_d = np.log(n), np.log(d)
    self.center_n, self.center_d = log_n.mean(), log_d.mean()
    self.n, self.d = log_n - self.center_n, log_d - self.center_d
    self.losses, self.log_loss = losses, np.log(losses)
    self.prior_weight = 0.0

  def starts(self) -> np.ndarray:
    """Chinchilla's grid: [4500, 5] of centred (log A, log B, log E, alpha, beta)."""
    grid = np.array(list(itertools.product(*START_GRID)))
    return self._tie(np.column_stack([
      grid[:, 0] - grid[:, 3] * self.center_n, grid[:, 1] - grid[:, 4] * self.center_d, grid[:, 2:5],
    ]))  # fmt: skip

  def _tie(self, x: np.ndarray) -> np.ndarray:
    if self.options.tied:
      x = x[x[:, 3] == x[:, 4]]
    if self.options.fixed_E is not None:
      x = np.unique(np.column_stack([x[:, :2], np.full(len(x), np.log(self.options.fixed_E)), x[:, 3:]]), axis=0)
    return x

  def objective(self, weights: np.ndarray | None = None):
    """The objective; `weights` [problems, rows] of bootstrap samples."""
    delta, options = self.options.delta, self.options

    def value_and_gradient(x: np.ndarray, problems: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
      with np.errstate(all="ignore"):  # far starts give inf, which no step is taken to
        of_n = np.exp(x[:, 0:1] - x[:, 3:4] * self.n)  # [b, rows]
        of_d = np.exp(x[:, 1:2] - x[:, 4:5] * self.d)
        floor = np.exp(x[:, 2:3])
        total = of_n + of_d + floor
        if options.objective == "squares":
          slope = total - self.losses
          loss = 0.5 * slope**2
        else:
          residual = np.log(total) - self.log_loss
          clipped = np.clip(residual, -delta, delta)
          loss = clipped * (residual - 0.5 * clipped)
          slope = clipped / total
        if weights is not None:
          loss, slope = loss * weights[problems], slope * weights[problems]
        by_n, by_d = slope * of_n, slope * of_d
        gradient = np.stack(
          [
            by_n.sum(1), by_d.sum(1), (slope * floor).sum(1), -(by_n * self.n).sum(1), -(by_d * self.d).sum(1),
          ],
          axis=1,
        )  # fmt: skip
        value = loss.sum(1)
        if options.prior_E is not None:
          mean, deviation = options.prior_E
          off = (floor[:, 0] - mean) / deviation
          value = value + self.prior_weight * 0.5 * off**2
          gradient[:, 2] += self.prior_weight * off * floor[:, 0] / deviation
      if options.fixed_E is not None:
        gradient[:, 2] = 0.0
      if options.tied:
        gradient[:, 3:5] = gradient[:, 3:5].sum(1, keepdims=True) / 2
      with np.errstate(all="ignore"):
        return value / delta**2, gradient / delta**2

    return value_and_gradient

  def surface(self, x: np.ndarray) -> Surface:
    """Points [..., 5] as a surface of the uncentred N and D."""
    alpha, beta = x[..., 3], x[..., 4]
    with np.errstate(all="ignore"):
      of_n, of_d = np.exp(x[..., 0] + alpha * self.center_n), np.exp(x[..., 1] + beta * self.center_d)
    return Surface(np.exp(x[..., 2]), of_n, of_d, alpha, beta)

  def centered(self, surface: Surface) -> np.ndarray:
    """The point of a surface: [5]. The inverse of `surface`."""
    s = surface
    log_a, log_b = np.log(s.A) - s.alpha * self.center_n, np.log(s.B) - s.beta * self.center_d
    return np.array([log_a, log_b, np.log(s.E), s.alpha, s.beta], np.float64)


def fit_surface(
  n: np.ndarray,
  d: np.ndarray,
  losses: np.ndarray,
  options: ParametricOptions | None = None,
  bootstrap: int = 1000,
  per_scale: float = 6.0,
  seed: int = 0,
) -> ParametricFit:
  """Fits the surface from Chinchilla's 4,500 starts, with analytic gradients in float64.

  Args:
    n, d, losses: scale, tokens and loss of each run: [rows].
    bootstrap: number of samples of the rows, each fitted from the optima of the whole table.
    per_scale: C over N D: 6 for parameters, 1 for M.

  Raises:
    DataError: too few runs for the number of parameters.
  """
  options = options or ParametricOptions()
  n, d, losses = (np.asarray(x, np.float64) for x in (n, d, losses))
  if len(n) < options.num_parameters:
    raise DataError(f"{len(n)} runs for {options.num_parameters} parameters: add runs, or fix some (--fixed_E, --tied)")
  if np.ptp(losses) == 0:
    raise DataError(
      f"all {len(n)} runs have the same loss, {losses[0]:g}: there is nothing to fit; check the column of losses"
    )
  problem = _Problem(n, d, losses, options)
  x, values = _minimize_starts(problem)
  if options.prior_E is not None:
    # The prior counts as the data do, whose errors are Laplace's of this width: Huber's loss is delta * width of it.
    width = np.abs(np.log(problem.surface(x[0]).loss(n, d) / losses)).mean()
    problem.prior_weight = options.delta * max(width, options.delta)
    x, values = _minimize_starts(problem)
  distinct = _distinct_optima(x, values)
  samples = None
  if bootstrap:
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(len(n), np.full(len(n), 1 / len(n)), size=bootstrap).astype(np.float64)
    best_x, best = np.repeat(x[:1], bootstrap, 0), np.full(bootstrap, np.inf)
    for start in distinct[:3]:
      candidate, value = minimize(problem.objective(weights), np.repeat(start[None], bootstrap, 0), 200, 1e-9)
      better = value < best
      best_x[better], best[better] = candidate[better], value[better]
    samples = problem.surface(best_x)
  return ParametricFit(
    _as_floats(problem.surface(x[0])), samples, float(values[0]), len(distinct), per_scale, n, d, losses, options
  )


def fit_parametric(
  table: RunTable, scale: str = "M", options: ParametricOptions | None = None, bootstrap: int = 1000, seed: int = 0
) -> ParametricFit:
  """Approach 3 on the losses of a table; of runs that differ by their settings alone the best, see `best_of_each_run`.

  `scale`: a key of SCALES. Other arguments and errors: those of `fit_surface`.
  """
  n, d, losses, rows = best_of_each_run(table, scale)
  fit = fit_surface(n, d, losses, options, bootstrap, flops_per_scale(scale), seed)
  return dataclasses.replace(fit, rows=tuple(rows))


def _minimize_starts(problem: _Problem) -> tuple[np.ndarray, np.ndarray]:
  """Points and values of the best starts, best first: all go some way, the best of them to the end."""
  objective = problem.objective()
  x, values = minimize(objective, problem.starts(), 60, 1e-6)
  x = x[np.argsort(values)[:POLISHED]]
  x, values = minimize(objective, x, 2000, 1e-15)
  order = np.argsort(values)
  return x[order], values[order]


def _distinct_optima(x: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
  """The optima within SAME_OPTIMUM of the best that differ from it, and from one another, by more than 5% in an exponent."""
  found: list[np.ndarray] = []
  for point, value in zip(x, values, strict=True):
    close = value <= values[0] + SAME_OPTIMUM * max(values[0], 1.0)
    if close and all(np.abs(point[3:5] / other[3:5] - 1).max() > 0.05 for other in found):
      found.append(point)
  return found


def _as_floats(surface: Surface) -> Surface:
  # numpy's scalars, whose divisions by zero are not errors
  return Surface(**{name: np.float64(getattr(surface, name)) for name in NAMES})
