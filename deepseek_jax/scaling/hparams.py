"""Laws of learning rate and batch size, refitted from runs that vary them (DeepSeek LLM section 3.1)."""

import dataclasses
import json
import os
from typing import Any

import numpy as np

from deepseek_jax.errors import ConfigError, DataError
from deepseek_jax.scaling.budgets import seed_noise
from deepseek_jax.scaling.intervals import Interval, percentile_interval
from deepseek_jax.scaling.laws import HYPERPARAM_LAWS, ComputeLaw, HyperparamLaw, PowerLaw, hyperparam_law
from deepseek_jax.scaling.table import SCALES, RunTable

TOLERANCE = 0.0025  # DeepSeek LLM: near-optimal is within 0.25% of the smallest loss
FIELDS = ("lr", "batch_tokens")  # a table may have one of them
WIDE = 4
SAME_SETTING = 0.05  # FLOPs, scale and tokens this near to each other are of one setting


@dataclasses.dataclass(frozen=True)
class Basin:
  """The runs of one model and number of tokens that vary learning rate and batch.

  Attributes:
    best: field -> value of the run with the smallest loss.
    center: field -> the vertex of a quadratic of log loss through the good runs; where that has none inside of what was
      tried, the geometric mean of the runs within the tolerance of the smallest loss.
    low, high: field -> the extremes of the runs within the tolerance.
    at_edge: fields whose center is at the edge of what was tried.
    rows: indices into the table.
  """

  flops: float
  loss: float
  near: int
  best: dict[str, float]
  center: dict[str, float]
  low: dict[str, float]
  high: dict[str, float]
  at_edge: tuple[str, ...]
  rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class HyperparamFit:
  """value = coefficient * C ** exponent for each field, through the centers of the basins, and through the best runs.

  `laws` is None where there is one budget: an exponent needs two.
  """

  basins: tuple[Basin, ...]
  laws: dict[str, PowerLaw] | None
  argmin_laws: dict[str, PowerLaw] | None
  samples: dict[str, np.ndarray]  # field -> [k, 2] log coefficients and exponents
  tolerance: float
  noise: float | None  # standard deviation of log loss between seeds of one setting; None: no setting has two

  def interval(self, field: str, index: int, ci: float = 0.95) -> Interval | None:
    """Interval of the coefficient (index 0) or the exponent (1)."""
    if field not in self.samples or not len(self.samples[field]):
      return None
    column = self.samples[field][:, index]
    return percentile_interval(np.exp(column) if index == 0 else column, ci)

  def to_json(self) -> dict[str, Any]:
    """The content of hparams --json, which plan --law takes."""
    tree: dict[str, Any] = {"tolerance": self.tolerance, "noise": self.noise}
    for field in FIELDS:
      law, argmin = (laws.get(field) if laws else None for laws in (self.laws, self.argmin_laws))
      tree[field] = {
        "coefficient": law and law.coefficient, "exponent": law and law.exponent,
        "ci": {"coefficient": self.interval(field, 0), "exponent": self.interval(field, 1)},
        "argmin": argmin and dataclasses.asdict(argmin),
      }  # fmt: skip
    names = ("flops", "loss", "near", "best", "center", "low", "high")
    tree["basins"] = [{name: getattr(b, name) for name in names} for b in self.basins]
    tree["diagnostics"] = self.diagnostics()
    return tree

  def diagnostics(self) -> list[str]:
    """What a reader should know of the fit, a sentence each."""
    found = []
    for basin in self.basins:
      for field in basin.at_edge:
        found.append(
          f"at {basin.flops:.3g} FLOPs the best {field}, {basin.best[field]:.4g}, is the smallest or largest that was tried: "
          "the optimum may be outside"
        )
    if self.noise and self.noise > self.tolerance:
      found.append(
        f"seeds of one setting differ by {self.noise:.2%} of the loss, more than the tolerance of {self.tolerance:.2%}: which "
        "settings are near-optimal is chance; raise --tolerance, or add seeds"
      )
    if not self.laws:
      found.append("one budget: an exponent needs two at least")
    elif len(self.basins) == 2:
      found.append("two budgets: the exponents have no residual to judge them by")
    return found


def fit_hyperparams(
  table: RunTable, tolerance: float = TOLERANCE, bootstrap: int = 1000, seed: int = 0
) -> HyperparamFit:
  """Power laws of the near-optimal learning rate and batch size over compute.

  Runs with the same FLOPs, scale and tokens, within SAME_SETTING, are one basin. Bootstrap samples draw basins, and add
  the noise between seeds to the losses where the table has several.

  Raises DataError where no basin has three runs that differ in a field.
  """
  if not 0 < tolerance < 1:
    raise DataError(f"--tolerance={tolerance}: expected a fraction of the loss, as 0.0025")
  losses, flops = table[table.loss_name()], table.flops()
  values = {field: table[field] for field in FIELDS if field in table}
  if not values:
    table[FIELDS[0]]  # says how to name it
  scale = table.default_scale() if SCALES[table.default_scale()] in table else None
  keys = [flops, *([table["tokens"]] if "tokens" in table else []), *([table.scale(scale)] if scale else [])]
  groups = [rows for rows in _groups(np.log(np.stack(keys, 1))) if len(rows) >= 3]
  groups = [rows for rows in groups if any(len(set(column[rows])) > 1 for column in values.values())]
  if not groups:
    raise DataError(
      f"{table.path}: no model and number of tokens has three runs that differ in lr or batch_tokens: a sweep with "
      "plan --grid_budget has them"
    )
  basins = tuple(_basin(rows, flops, losses, values, tolerance) for rows in groups)
  basins = tuple(sorted(basins, key=lambda b: b.flops))
  laws = _laws(basins, "center") if _distinct_budgets(basins) > 1 else None
  argmin = _laws(basins, "best") if laws else None
  samples: dict[str, list[tuple[float, float]]] = {field: [] for field in values}
  noise = seed_noise(table, scale, losses) if scale else None
  if laws and bootstrap:
    generator = np.random.default_rng(seed)
    for _ in range(bootstrap):
      noisy = losses * np.exp((noise or 0.0) * generator.standard_normal(len(losses)))
      drawn = [basins[i] for i in generator.integers(len(basins), size=len(basins))]
      if _distinct_budgets(drawn) < 2:
        continue
      sampled = _laws(tuple(_basin(b.rows, flops, noisy, values, tolerance) for b in drawn), "center")
      for field, law in sampled.items():
        samples[field].append((np.log(law.coefficient), law.exponent))
  arrays = {field: np.array(rows) for field, rows in samples.items()}
  return HyperparamFit(basins, laws, argmin, arrays, tolerance, noise)


def _groups(keys: np.ndarray) -> list[np.ndarray]:
  """Indices of rows whose keys are all within SAME_SETTING of the first one's."""
  groups: list[list[int]] = []
  for i, key in enumerate(keys):
    found = next((g for g in groups if np.abs(keys[g[0]] - key).max() <= np.log(1 + SAME_SETTING)), None)
    if found is None:
      groups.append([i])
    else:
      found.append(i)
  return [np.array(g) for g in groups]


def _basin(
  rows: np.ndarray, flops: np.ndarray, losses: np.ndarray, values: dict[str, np.ndarray], tolerance: float
) -> Basin:
  every, (rows, losses) = rows, _means_over_seeds(rows, losses, values)
  best = rows[losses[rows].argmin()]
  near = rows[losses[rows] <= losses[best] * (1 + tolerance)]
  logs = {field: np.log(column[near]) for field, column in values.items()}
  center = {field: float(np.exp(column.mean())) for field, column in logs.items()}
  center |= _vertex(rows, losses, values, tolerance)
  tried = {field: column[rows] for field, column in values.items()}
  edges = tuple(
    f for f in values if tried[f].min() < tried[f].max() and values[f][best] in (tried[f].min(), tried[f].max())
  )
  return Basin(
    flops=float(np.exp(np.log(flops[rows]).mean())), loss=float(losses[best]), near=len(near),
    best={f: float(values[f][best]) for f in values}, center=center,
    low={f: float(np.exp(logs[f].min())) for f in values}, high={f: float(np.exp(logs[f].max())) for f in values},
    at_edge=edges, rows=every,
  )  # fmt: skip


def _means_over_seeds(
  rows: np.ndarray, losses: np.ndarray, values: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
  """(a row for each learning rate and batch, losses in which that row has the mean of its seeds)."""
  settings: dict[tuple[float, ...], list[int]] = {}
  for i in rows.tolist():
    settings.setdefault(tuple(float(column[i]) for column in values.values()), []).append(i)
  means = losses.copy()
  for group in settings.values():
    means[group[0]] = losses[group].mean()
  return np.array([group[0] for group in settings.values()]), means


def _vertex(rows: np.ndarray, losses: np.ndarray, values: dict[str, np.ndarray], tolerance: float) -> dict[str, float]:
  """{field: value} at the minimum of a quadratic of log loss over the logs of the fields that vary; {} where it has none.

  Of runs within WIDE times the tolerance of the smallest loss, and of as many as a quadratic needs.
  """
  varied = [f for f in values if len(set(values[f][rows])) > 2]
  terms = 1 + len(varied) * (len(varied) + 3) // 2
  ordered = rows[np.argsort(losses[rows], kind="stable")]
  wide = int((losses[rows] <= losses[ordered[0]] * (1 + WIDE * tolerance)).sum())
  used = ordered[: max(wide, terms + 1)]
  if not varied or len(used) <= terms:
    return {}
  x = np.stack([np.log(values[f][used]) for f in varied], 1)
  middle, pairs = x.mean(0), [(i, j) for i in range(len(varied)) for j in range(i, len(varied))]
  x = x - middle
  design = np.column_stack([np.ones(len(x)), x, *(x[:, i] * x[:, j] for i, j in pairs)])
  solution, _, rank, _ = np.linalg.lstsq(design, np.log(losses[used]), rcond=None)
  hessian = np.zeros((len(varied),) * 2)
  for (i, j), c in zip(pairs, solution[1 + len(varied) :], strict=True):
    hessian[i, j] += c
    hessian[j, i] += c
  if rank < terms or np.linalg.eigvalsh(hessian).min() <= 0:
    return {}
  vertex = np.exp(middle - np.linalg.solve(hessian, solution[1 : 1 + len(varied)]))
  inside = all(values[f][rows].min() <= v <= values[f][rows].max() for f, v in zip(varied, vertex, strict=True))
  return dict(zip(varied, vertex.tolist(), strict=True)) if inside else {}


def _distinct_budgets(basins: Any) -> int:
  logs = sorted(np.log(b.flops) for b in basins)
  return 1 + sum(b - a > np.log(1 + SAME_SETTING) for a, b in zip(logs, logs[1:], strict=False))


def _laws(basins: tuple[Basin, ...], kind: str) -> dict[str, PowerLaw]:
  """{field: law} by least squares in log space through the `kind` of each basin: best or center."""
  log_c = np.log([b.flops for b in basins])
  laws = {}
  for field in basins[0].best:
    exponent, log_coefficient = np.polyfit(log_c, np.log([getattr(b, kind)[field] for b in basins]), 1)
    laws[field] = PowerLaw(float(np.exp(log_coefficient)), float(exponent))
  return laws


def load_law(name: str) -> HyperparamLaw:
  """The law of --law: a name of HYPERPARAM_LAWS, or a file that hparams --json wrote. Raises ConfigError."""
  if name in HYPERPARAM_LAWS or not os.path.isfile(name):
    return hyperparam_law(name)
  try:
    with open(name, encoding="utf-8") as file:
      tree = json.load(file)
    laws = [PowerLaw(float(tree[f]["coefficient"]), float(tree[f]["exponent"])) for f in FIELDS]
  except (OSError, ValueError, KeyError, TypeError):
    raise ConfigError(
      f"--law={name} has no laws of lr and batch_tokens: it must be a file that scaling hparams --json wrote, of two budgets "
      "at least"
    ) from None
  return ComputeLaw(os.path.basename(name), *laws)
