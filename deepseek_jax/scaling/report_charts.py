"""The charts of the scaling report: what each shows, as layers of `charts.chart`."""

import dataclasses
import html
from collections.abc import Iterator, Sequence

import numpy as np

from deepseek_jax.scaling.analysis import ScalingFit
from deepseek_jax.scaling.charts import Layer, chart
from deepseek_jax.scaling.hparams import HyperparamFit
from deepseek_jax.scaling.isoflop import FrontierFit
from deepseek_jax.scaling.parametric import ParametricFit, Surface
from deepseek_jax.scaling.table import RunTable

EXTRAPOLATE = 10  # curves go on to this times the largest compute
AXES = {"M": "non-embedding FLOPs per token", "N": "parameters", "N_nonemb": "non-embedding parameters"}
Chart = tuple[str, str, str, str]  # title, unit, legend, SVG


def charts(table: RunTable, scale: str, fits: dict[str, ScalingFit], hparams: HyperparamFit | None) -> Iterator[Chart]:
  """The charts that the table and its fits have."""
  frontier = next((fits[name].fit for name in ("2", "1") if name in fits), None)
  surface = fits["3"].fit if "3" in fits else None
  loss, x = table.loss_name(), AXES[scale]
  if isinstance(frontier, FrontierFit):
    yield _figure("IsoFLOP profiles", f"{loss} over {x}; rings: optima", _profiles(frontier))
    yield _figure("Compute-optimal scale", f"{x}, over FLOPs", _allocation(fits, frontier), log_y=True)
  yield _figure("Optimal loss", f"{loss} over FLOPs; all runs as dots", _extrapolation(table, fits), log_y=True)
  if isinstance(surface, ParametricFit):
    yield _figure("Surface", f"tokens over {x}: lines of equal loss, and the runs", _contours(surface), log_y=True)
    yield _figure("Residuals of approach 3", "predicted / measured - 1 in %, over FLOPs", _residuals(table, surface))
  if hparams:
    yield from _basins(table, hparams)


def _figure(title: str, unit: str, layers: Sequence[Layer], log_y: bool = False) -> Chart:
  named = list(dict.fromkeys((layer.name, layer.color) for layer in layers if layer.name and layer.points))
  legend = (
    "".join(f'<i class="s{color % 8}">{html.escape(name)}</i>' for name, color in named) if len(named) > 1 else ""
  )
  return title, unit, legend, chart(layers, log_y=log_y)


def _profiles(fit: FrontierFit) -> list[Layer]:
  layers = []
  for i, (runs, vertex) in enumerate(zip(fit.profiles, fit.vertices, strict=True)):
    points = list(zip(runs.scales.tolist(), runs.losses.tolist(), strict=True))
    name = f"{runs.flops:.2g}"
    layers += [Layer(name, "line", points, i), Layer(name, "dots", points, i)]
    if not vertex.is_edge:
      layers.append(Layer(f"optimum at {name} FLOPs", "rings", [(vertex.scale, vertex.loss)], i))
  rings = [layer for layer in layers if layer.kind == "rings"]
  return [layer for layer in layers if layer.kind != "rings"] + [
    Layer("", "rings", ring.points, ring.color, [ring.name]) for ring in rings
  ]


def _compute_grid(flops: np.ndarray) -> np.ndarray:
  return np.geomspace(flops.min(), flops.max() * EXTRAPOLATE, 40)


def _allocation(fits: dict[str, ScalingFit], frontier: FrontierFit) -> list[Layer]:
  grid = _compute_grid(np.array([v.flops for v in frontier.vertices]))
  layers = []
  for color, (name, title) in enumerate((("2", "approach 2"), ("3", "approach 3"), ("1", "approach 1"))):
    if name not in fits:
      continue
    fit = fits[name].fit
    assert isinstance(fit, (FrontierFit, ParametricFit))
    optima = [(c, *_flat(fit.optimal(c))) for c in grid.tolist()]
    layers.append(Layer(title, "line", [p[:2] for p in optima], color))
    if name == "2":
      layers.append(Layer(title, "band", [(p[0], p[2], p[3]) for p in optima if len(p) == 4], color))
  points = [(v.flops, v.scale) for v in frontier.vertices if not v.is_edge]
  edges = [(v.flops, v.scale) for v in frontier.vertices if v.is_edge]
  layers += [Layer("", "dots", points, 0, ["optimum"] * len(points))]
  return layers + [Layer("at an edge, not fitted", "rings", edges, 4)] * bool(edges)


def _flat(estimate: tuple[float, tuple[float, float] | None]) -> tuple[float, ...]:
  return (estimate[0], *(estimate[1] or ()))


def _extrapolation(table: RunTable, fits: dict[str, ScalingFit]) -> list[Layer]:
  flops, losses = table.flops(), table[table.loss_name()]
  names = _run_names(table)
  layers = [Layer("", "dots", list(zip(flops.tolist(), losses.tolist(), strict=True)), 5, names)]
  grid = _compute_grid(flops)
  for color, name, held, title in (
    (0, "3", False, "approach 3"),
    (1, "3 held out", True, "approach 3, without the largest budget"),
  ):
    fit = fits[name].fit if name in fits else None
    if not isinstance(fit, ParametricFit):
      continue
    points = [(c, *_flat(fit.loss_at_optimum(c))) for c in grid.tolist()]
    layers.append(Layer(title, "dashed" if held else "line", [p[:2] for p in points], color))
    if held:
      layers.append(Layer(title, "band", [(p[0], p[2], p[3]) for p in points if len(p) == 4], color))
  for color, name, title in ((2, "2", "approach 2"), (3, "2 held out", "approach 2, without it")):
    if name in fits and isinstance(frontier := fits[name].fit, FrontierFit):
      estimate = dataclasses.replace(frontier, samples=None)  # without an interval
      kind = "line" if name == "2" else "dashed"
      layers.append(Layer(title, kind, [(c, estimate.predict(c)[0]) for c in grid.tolist()], color))
  return layers


def _contours(fit: ParametricFit) -> list[Layer]:
  """Lines of equal loss: the tokens at which the surface has it, for each scale."""
  s = fit.surface
  layers: list[Layer] = []
  scales = np.geomspace(fit.n.min(), fit.n.max(), 60)
  for level in np.quantile(fit.losses, [0.02, 0.2, 0.4, 0.6, 0.8, 0.98]):
    tokens = _tokens_for(s, scales, float(level))
    inside = (tokens > fit.d.min() / 2) & (tokens < fit.d.max() * 2)
    points = list(zip(scales[inside].tolist(), tokens[inside].tolist(), strict=True))
    layers.append(Layer(f"{level:.3g}", "line", points, len(layers)))
  runs = list(zip(fit.n.tolist(), fit.d.tolist(), strict=True))
  return [*layers, Layer("", "dots", runs, 5, [f"loss {loss:.4f}" for loss in fit.losses])]


def _tokens_for(s: Surface, scales: np.ndarray, loss: float) -> np.ndarray:
  left = loss - s.E - s.A / scales**s.alpha
  return np.where(left > 0, (s.B / np.where(left > 0, left, 1.0)) ** (1 / s.beta), np.inf)


def _residuals(table: RunTable, fit: ParametricFit) -> list[Layer]:
  """Of the runs that approach 3 fits, which may be fewer than the table's."""
  flops, off = fit.per_scale * fit.n * fit.d, np.expm1(fit.residuals()) * 100
  numbers = dict(zip(table.rows, _run_names(table), strict=True))
  names = [numbers[row] for row in fit.rows]
  zero = [(float(flops.min()), 0.0), (float(flops.max()), 0.0)]
  dots = list(zip(flops.tolist(), off.tolist(), strict=True))
  return [Layer("", "dashed", zero, 5), Layer("", "dots", dots, 0, names)]


def _run_names(table: RunTable) -> list[str]:
  return table["run_id"].tolist() if "run_id" in table else [f"row {row}" for row in table.rows]


def _basins(table: RunTable, fit: HyperparamFit) -> Iterator[Chart]:
  """Loss over learning rate by batch, and over batch by learning rate; with times, the batch scan of time and loss."""
  losses = table[table.loss_name()]
  columns = {name: table[name] for name in fit.basins[0].best}
  for basin in fit.basins:
    rows, at = basin.rows, f"{basin.flops:.3g} FLOPs"
    for name, (title, unit) in {
      "lr": ("Learning rate", "lr"),
      "batch_tokens": ("Batch size", "tokens of a batch"),
    }.items():
      if name not in columns or len(set(columns[name][rows])) < 2:
        continue
      x = columns[name]
      other = next((column for key, column in columns.items() if key != name), np.ones(len(losses)))
      label = next((key.removesuffix("_tokens") for key in columns if key != name), "")
      layers = []
      for color, value in enumerate(sorted(set(other[rows].tolist()))):
        chosen = [i for i in rows.tolist() if other[i] == value]
        means = sorted(
          {float(x[i]): float(np.mean([losses[j] for j in chosen if x[j] == x[i]])) for i in chosen}.items()
        )
        series = f"{label} {value:.4g}" if label else ""
        layers += [Layer(series, "line", means, color), Layer(series, "dots", means, color)]
      near = basin.loss * (1 + fit.tolerance)
      ends = [(float(x[rows].min()), near), (float(x[rows].max()), near)]
      layers.append(Layer(f"+{fit.tolerance:.2%}", "dashed", ends, 5))
      yield _figure(f"{title} at {at}", f"{table.loss_name()} over {unit}", layers)
    seconds = table.optional("seconds")
    if seconds is not None:
      points = [(float(seconds[i]), float(losses[i])) for i in rows]
      names = [", ".join(f"{name} {column[i]:.4g}" for name, column in columns.items()) for i in rows]
      layers = [Layer("", "dots", points, 0, names)]
      yield _figure(f"Time and loss at {at}", f"{table.loss_name()} over seconds of training", layers)
