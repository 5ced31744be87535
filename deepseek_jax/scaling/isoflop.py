"""Approaches 1 and 2: the compute-optimal scale at each budget, and power laws through these optima.

Approach 1 takes the envelope of all runs, approach 2 the vertex of the profile of each budget (Chinchilla sections 3.1, 3.2;
DeepSeek LLM section 3.2).
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from deepseek_jax.errors import DataError
from deepseek_jax.scaling.budgets import BudgetRuns, best_of_each_size, budget_indices, check_budgets, seed_noise
from deepseek_jax.scaling.intervals import Interval, percentile_interval
from deepseek_jax.scaling.parametric import ParametricFit, fit_surface
from deepseek_jax.scaling.table import RunTable

GRID = 1024  # points between the smallest and the largest size among which an interpolation's minimum is looked for
LEAST_SIZES = 3  # of a profile
BUDGETS_FOR_E = 3  # as many vertices tell the irreducible loss
LEAST_RUNS_OF_SURFACE = 8
PARABOLA_SPAN = 4.0  # sizes within this factor of the best one count for a parabola: the far branches are none


@dataclasses.dataclass(frozen=True)
class Vertex:
  """The optimum of a budget."""

  flops: float
  scale: float
  tokens: float
  loss: float
  is_edge: bool = False  # the best size is the smallest or the largest: the optimum may be outside


@dataclasses.dataclass(frozen=True)
class FrontierFit:
  """N_opt = G C^a, D_opt = G_D C^b, through the vertices that are no edges.

  Attributes:
    interpolation: how the vertices were found.
    samples: columns a, b, log G, log G_D and then the losses of the vertices of bootstrap samples; None: none.
    noise: standard deviation of log loss in the samples; None: not known, and then there are no samples.
  """

  a: float
  b: float
  G: float
  G_tokens: float
  interpolation: str
  vertices: tuple[Vertex, ...]
  profiles: tuple[BudgetRuns, ...]
  samples: np.ndarray | None
  noise: float | None

  def optimal(self, flops: float, ci: float = 0.95) -> tuple[float, Interval | None]:
    """(compute-optimal scale, its interval) of a budget."""
    interval = None
    if self.samples is not None:
      interval = percentile_interval(np.exp(self.samples[:, 2] + self.samples[:, 0] * np.log(flops)), ci)
    return self.G * flops**self.a, interval

  def predict(self, flops: float, fixed_E: float | None = None, ci: float = 0.95) -> tuple[float, Interval | None]:
    """(loss at the optimum of a budget, its interval): E + k C^-gamma through the vertices.

    Two budgets do not tell E: it is that of approach 3 on the same runs then, or 0 where these are too few for that.
    """
    keep = [i for i, v in enumerate(self.vertices) if not v.is_edge]
    log_c = np.log([self.vertices[i].flops for i in keep])
    losses = np.array([[self.vertices[i].loss for i in keep]])
    count = 0 if self.samples is None else len(self.samples)
    floor = None if fixed_E is None else np.array([fixed_E])
    floors = None if fixed_E is None else np.full(count, fixed_E)
    if fixed_E is None and len(keep) < BUDGETS_FOR_E:
      floor, floors = np.zeros(1), np.zeros(count)
      if surface := self._surface:
        floor = np.array([surface.surface.E])
        floors = floors if surface.samples is None else np.resize(surface.samples.E, count)
    value = float(predict_losses(log_c, losses, np.log(flops), floor)[0])
    if self.samples is None:
      return value, None
    drawn = predict_losses(log_c, self.samples[:, 4:][:, keep], np.log(flops), floors)
    return value, percentile_interval(drawn, ci)

  @functools.cached_property
  def _surface(self) -> ParametricFit | None:
    """Approach 3 on the same runs, or None where these are too few for it. Cached, since a curve is many predictions."""
    if sum(len(p.scales) for p in self.profiles) < LEAST_RUNS_OF_SURFACE:
      return None
    return surface_of(self.profiles, bootstrap=0 if self.samples is None else min(len(self.samples), 200))


def predict_losses(log_c: np.ndarray, losses: np.ndarray, at: float, floors: np.ndarray | None = None) -> np.ndarray:
  """The loss at log compute `at`, of E + k C^-gamma, for each row of `losses`: [samples].

  Least squares of log (loss - E) over log compute for each E on a grid, which is refined around the best one.

  Args:
    log_c: [budgets]. losses: [samples, budgets].
    floors: E of each sample, [samples]; None: fitted, from 0 on.
  """
  centered = log_c - log_c.mean()
  losses = np.where(losses > 0, losses, np.nan)  # the vertex of a parabola through noise may be anywhere
  smallest = losses.min(1)

  def lines(floors):
    """(sum of squared log residuals of the loss, prediction) for floors [samples, n]."""
    above = np.maximum(losses[:, None] - floors[..., None], 1e-3 * smallest[:, None, None])
    y = np.log(above)  # [samples, n, budgets]
    slope = (y * centered).sum(-1) / (centered**2).sum()
    level = y.mean(-1)
    predicted = floors[..., None] + np.exp(level[..., None] + slope[..., None] * centered)
    squares = (np.log(predicted / losses[:, None]) ** 2).sum(-1)
    return np.nan_to_num(squares, nan=np.inf), floors + np.exp(level + slope * (at - log_c.mean()))

  if floors is not None:
    return lines(floors[:, None])[1][:, 0]
  low, high = np.zeros(len(losses)), 0.999 * smallest
  rows = np.arange(len(losses))
  for _ in range(4):
    grid = np.linspace(low, high, 40, axis=1)
    squares, predicted = lines(grid)
    best = squares.argmin(1)
    low, high = grid[rows, np.maximum(best - 1, 0)], grid[rows, np.minimum(best + 1, 39)]
  return predicted[rows, best]


def akima_vertex(runs: BudgetRuns) -> Vertex:
  """The minimum of the Akima interpolation of log loss over log scale, between the smallest and the largest size."""
  log_n = np.log(runs.scales)
  grid = np.linspace(log_n[0], log_n[-1], GRID)
  curve = _akima(runs, grid)
  i = int(curve.argmin())
  at, value = grid[i], curve[i]
  if 0 < i < GRID - 1:  # a parabola through three neighbours is finer than the grid
    below, here, above = curve[i - 1 : i + 2]
    bend = below - 2 * here + above
    if bend > 0:
      shift = 0.5 * (below - above) / bend
      at, value = at + shift * (grid[1] - grid[0]), here - 0.25 * (below - above) * shift
  tokens = float(np.exp(np.interp(at, log_n, np.log(runs.tokens))))
  return Vertex(runs.flops, float(np.exp(at)), tokens, float(np.exp(value)), i in (0, GRID - 1))


def parabola_vertex(runs: BudgetRuns, span: float = PARABOLA_SPAN) -> Vertex:
  """The vertex of the least-squares parabola of loss over log scale, of sizes within a factor `span` of the best one."""
  log_n, best = np.log(runs.scales), int(runs.losses.argmin())
  (curvature, slope, intercept), center = _parabola(runs, span)
  at = center - 0.5 * slope / curvature if curvature > 0 else log_n[best]
  is_edge = bool(curvature <= 0 or not log_n[0] < at < log_n[-1])
  at = min(max(at, log_n[0]), log_n[-1])
  loss = intercept - 0.25 * slope**2 / curvature if curvature > 0 else runs.losses[best]
  tokens = float(np.exp(np.interp(at, log_n, np.log(runs.tokens))))
  return Vertex(runs.flops, float(np.exp(at)), tokens, float(loss), is_edge)


def profile_curve(runs: BudgetRuns, interpolation: str, scales: np.ndarray, span: float = PARABOLA_SPAN) -> np.ndarray:
  """The losses at `scales` by an interpolation of a profile: the curve whose vertex is the optimum of the budget.

  Args:
    interpolation: a key of INTERPOLATIONS.
    scales: [n]. Akima interpolation gives NaN outside of the sizes of `runs`.
    span: as in `parabola_vertex`.
  """
  if interpolation == "akima":
    return np.exp(_akima(runs, np.log(scales)))
  coefficients, center = _parabola(runs, span)
  return np.polyval(coefficients, np.log(scales) - center)


def _akima(runs: BudgetRuns, log_scales: np.ndarray) -> np.ndarray:
  """Log loss at `log_scales`."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # equal neighbours
    return Akima1DInterpolator(np.log(runs.scales), np.log(runs.losses))(log_scales)


def _parabola(runs: BudgetRuns, span: float) -> tuple[np.ndarray, float]:
  """(coefficients of loss over log scale less the center, center); of all sizes where fewer than 3 are within `span`."""
  log_n = np.log(runs.scales)
  near = np.abs(log_n - log_n[runs.losses.argmin()]) <= np.log(span) + 1e-9
  if near.sum() < 3:
    near = np.ones(len(log_n), bool)
  center = log_n[near].mean()
  return np.polyfit(log_n[near] - center, runs.losses[near], 2), center


def smallest_loss(runs: BudgetRuns) -> Vertex:
  """The run with the smallest loss."""
  i = int(runs.losses.argmin())
  return Vertex(
    runs.flops, float(runs.scales[i]), float(runs.tokens[i]), float(runs.losses[i]), i in (0, len(runs.scales) - 1)
  )


def leave_one_out_errors(profiles: Sequence[BudgetRuns]) -> dict[str, float]:
  """Root mean square, in log loss, of what each interpolation says of sizes that it has not seen.

  Of sizes within PARABOLA_SPAN of the best one, but the outermost of these. infinite where there are too few sizes.
  """
  squares: dict[str, list[float]] = {"akima": [], "parabola": []}
  for p in profiles:
    x, y = np.log(p.scales), np.log(p.losses)
    near = np.abs(x - x[y.argmin()]) <= np.log(PARABOLA_SPAN) + 1e-9
    inner = np.flatnonzero(near)[1:-1] if near.sum() >= 5 else ()
    for i in inner:
      others = np.arange(len(x)) != i
      squares["akima"].append(float(Akima1DInterpolator(x[others], y[others])(x[i]) - y[i]) ** 2)
      parabola = np.polyfit(x[near & others] - x[i], y[near & others], 2)
      squares["parabola"].append(float(parabola[-1] - y[i]) ** 2)
  return {name: float(np.sqrt(np.mean(values))) if values else np.inf for name, values in squares.items()}


def better_interpolation(profiles: Sequence[BudgetRuns]) -> str:
  """The interpolation with the smaller `leave_one_out_errors`; parabola where there are too few sizes to tell."""
  errors = leave_one_out_errors(profiles)
  return "akima" if errors["akima"] < errors["parabola"] else "parabola"


INTERPOLATIONS: dict[str, Callable[[BudgetRuns], Vertex]] = {"akima": akima_vertex, "parabola": parabola_vertex}


def fit_isoflop(
  table: RunTable,
  scale: str = "M",
  interpolation: str = "auto",
  bootstrap: int = 1000,
  seed: int = 0,
  span: float = PARABOLA_SPAN,
) -> FrontierFit:
  """Approach 2: the vertex of each budget's profile, and power laws through them.

  Args:
    scale: a key of SCALES.
    interpolation: a key of INTERPOLATIONS, or auto: the one that tells left-out sizes better.
    bootstrap: number of samples. In each, every loss has noise: that between seeds, where the table has them, else that of
      the profiles around smooth curves. Without either there is no interval.
    span: as in `parabola_vertex`.

  Raises DataError for fewer than two budgets with LEAST_SIZES sizes and an optimum inside.
  """
  profiles = [p for p in budget_profiles(table, scale) if len(p.scales) >= LEAST_SIZES]
  check_budgets(table, [p.scales for p in profiles], 2)
  if interpolation == "auto":
    interpolation = better_interpolation(profiles)
  find = functools.partial(parabola_vertex, span=span) if interpolation == "parabola" else akima_vertex
  return _fit_frontier(table, profiles, find, None, interpolation, loss_noise(table, scale, profiles), bootstrap, seed)


def fit_envelope(table: RunTable, scale: str = "M", bootstrap: int = 1000, seed: int = 0) -> FrontierFit:
  """Approach 1: of each budget the run with the smallest loss, if no smaller budget has a smaller loss, and power laws.

  Of a table whose runs share no budgets these are the runs on the lower envelope of loss over compute. The smallest and the
  largest size of the table are edges. The optimum may lie up to half way to the next size: the interval has that too.
  """
  every = budget_profiles(table, scale)
  envelope, least = [], np.inf
  for profile in every:
    if profile.losses.min() < least:
      least = profile.losses.min()
      envelope.append(profile)
  check_budgets(table, [p.scales for p in envelope], 2)
  sizes = np.unique(np.concatenate([p.scales for p in every]))

  def find(runs: BudgetRuns) -> Vertex:
    found = smallest_loss(runs)
    at_ends = found.scale in (sizes[0], sizes[-1])
    return dataclasses.replace(found, is_edge=at_ends or (found.is_edge and len(runs.scales) >= LEAST_SIZES))

  def spread(vertex: Vertex, runs: BudgetRuns, generator: np.random.Generator) -> Vertex:
    """`vertex` moved within half of the distance to the next sizes: of its budget, or where that has one, of the table."""
    near = runs.scales if len(runs.scales) >= LEAST_SIZES else sizes
    i = int(np.searchsorted(near, vertex.scale))
    below, above = np.log(near[max(i - 1, 0)] / vertex.scale), np.log(near[min(i + 1, len(near) - 1)] / vertex.scale)
    factor = np.exp(generator.uniform(below / 2, above / 2))
    return dataclasses.replace(vertex, scale=vertex.scale * factor, tokens=vertex.tokens / factor)

  return _fit_frontier(table, envelope, find, spread, "envelope", loss_noise(table, scale, every), bootstrap, seed)


def budget_profiles(table: RunTable, scale: str) -> list[BudgetRuns]:
  """The best loss of each size at each budget, by increasing compute."""
  losses = table[table.loss_name()]
  return [best_of_each_size(table, scale, indices, losses) for indices in budget_indices(table)]


def loss_noise(table: RunTable, scale: str, profiles: Sequence[BudgetRuns]) -> float | None:
  """Standard deviation of log loss: between seeds, or around smooth profiles, or around approach 3's surface.

  None where the table has too few runs for any of them.
  """
  noise = seed_noise(table, scale, table[table.loss_name()])
  if noise is None:
    noise = profile_noise(profiles)
  if noise is None and sum(len(p.scales) for p in profiles) >= LEAST_RUNS_OF_SURFACE:
    residuals = surface_of(profiles, bootstrap=0).residuals()
    noise = float(np.sqrt((residuals**2).sum() / (len(residuals) - 5)))
  return noise


def surface_of(profiles: Sequence[BudgetRuns], bootstrap: int) -> ParametricFit:
  """Approach 3 on the runs of profiles."""
  n, d, losses = (np.concatenate([getattr(p, name) for p in profiles]) for name in ("scales", "tokens", "losses"))
  return fit_surface(n, d, losses, bootstrap=bootstrap)


def _fit_frontier(
  table: RunTable, profiles: Sequence[BudgetRuns], find: Callable[[BudgetRuns], Vertex],
  spread: Callable[[Vertex, BudgetRuns, np.random.Generator], Vertex] | None, interpolation: str, noise: float | None,
  bootstrap: int, seed: int,
) -> FrontierFit:  # fmt: skip
  vertices = [find(runs) for runs in profiles]
  inside = [v for v in vertices if not v.is_edge]
  if len(inside) < 2:
    rows = zip(vertices, profiles, strict=True)
    edges = ", ".join(f"{v.flops:.3g} FLOPs (row {p.first_row})" for v, p in rows if v.is_edge)
    raise DataError(
      f"{table.path}: the best size is the smallest or the largest one at {edges}: fewer than two budgets have an optimum "
      "inside; add smaller or larger models there"
    )
  samples = None
  if bootstrap and noise is not None:
    generator = np.random.default_rng(seed)
    samples = np.array([_sample(profiles, find, spread, noise, generator) for _ in range(bootstrap)])
  a, b, log_g, log_g_tokens = _power_laws(inside)
  g, g_tokens = float(np.exp(log_g)), float(np.exp(log_g_tokens))
  return FrontierFit(a, b, g, g_tokens, interpolation, tuple(vertices), tuple(profiles), samples, noise)


def _sample(
  profiles: Sequence[BudgetRuns], find: Callable[[BudgetRuns], Vertex],
  spread: Callable[[Vertex, BudgetRuns, np.random.Generator], Vertex] | None, noise: float, generator: np.random.Generator,
) -> list[float]:  # fmt: skip
  """A row of FrontierFit.samples: of losses with noise."""
  sample = []
  for p in profiles:
    noisy = dataclasses.replace(p, losses=p.losses * np.exp(noise * generator.standard_normal(len(p.losses))))
    vertex = find(noisy)
    sample.append(spread(vertex, noisy, generator) if spread else vertex)
  kept = [v for v in sample if not v.is_edge]
  law = _power_laws(kept) if len(kept) >= 2 else (np.nan,) * 4
  return [*law, *(v.loss for v in sample)]


def _power_laws(vertices: Sequence[Vertex]) -> tuple[float, float, float, float]:
  """(a, b, log G, log G_D) by least squares in log space."""
  log_c = np.log([v.flops for v in vertices])
  a, log_g = np.polyfit(log_c, np.log([v.scale for v in vertices]), 1)
  b, log_g_tokens = np.polyfit(log_c, np.log([v.tokens for v in vertices]), 1)
  return float(a), float(b), float(log_g), float(log_g_tokens)


def profile_noise(profiles: Sequence[BudgetRuns]) -> float | None:
  """Standard deviation of log loss around the cubic of each profile near its minimum; None where none has five sizes."""
  squares, freedom = 0.0, 0
  for p in profiles:
    log_n, log_loss = np.log(p.scales), np.log(p.losses)
    near = np.abs(log_n - log_n[p.losses.argmin()]) <= np.log(PARABOLA_SPAN) + 1e-9
    if near.sum() >= 5:
      x = log_n[near] - log_n[near].mean()
      residual = log_loss[near] - np.polyval(np.polyfit(x, log_loss[near], 3), x)
      squares, freedom = squares + float((residual**2).sum()), freedom + int(near.sum()) - 4
  return float(np.sqrt(squares / freedom)) if freedom else None
