"""Charts of the page of a comparison: curves over each axis, in tabs that need no script."""

import dataclasses
import html
import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from deepseek_jax.compare.groups import Group
from deepseek_jax.compare.runs import X_AXES, Curve
from deepseek_jax.training.plot import BINS, Series, downsample, line_chart

if TYPE_CHECKING:
  from deepseek_jax.compare.comparison import Comparison

COLORS = 16  # classes s0 to s15 of the style sheet: eight colors, the second time dashed
MAX_RUNS = 24  # of more, only the means over seeds are drawn
# Of more, hovering would show more lines than can be read: it names single curves then.
HOVERED_GROUPS, HOVERED_RUNS = 6, 8
CURVE_POINTS = 10_000  # of all curves of a chart together, so that a page of many runs stays small
UNITS = {"steps": "step", "tokens": "tokens", "flops": "FLOPs", "seconds": "s"}
TITLES = {
  "steps": "Steps", "tokens": "Tokens", "flops": "FLOPs", "seconds": "Time",
  "bits_per_byte": "Bits per byte", "loss": "Loss, nats per token",
}  # fmt: skip


def tabs(comparison: "Comparison") -> str:
  """The charts, a tab for each axis over which there is a curve; that of the comparison is open."""
  panels = {x_axis: panel for x_axis in X_AXES if (panel := "".join(_figures(comparison, x_axis)))}
  if not panels:
    return ""
  first = comparison.x_axis if comparison.x_axis in panels else next(iter(panels))
  inputs = "".join(
    f'<input type="radio" name="x" id="x-{x_axis}"{" checked" if x_axis == first else ""}>'
    f'<label for="x-{x_axis}">{TITLES[x_axis]}</label>'
    for x_axis in panels
  )
  bodies = "".join(
    f'<div class="panel {x_axis}"><div class="charts">{panel}</div></div>' for x_axis, panel in panels.items()
  )
  return f'<div class="tabs" role="group" aria-label="Horizontal axis">{inputs}{bodies}</div>'


def color_class(group: Group) -> str:
  """The class of a group's color."""
  return f"s{_index(group) % COLORS}"


def _index(group: Group) -> int:
  index = 0
  for character in group.letter:
    index = index * 26 + ord(character) - ord("A") + 1
  return index - 1


def _figures(comparison: "Comparison", x_axis: str) -> Iterator[str]:
  """For each metric, a chart of the whole and one of the second half, where differences show."""
  for metric in comparison.metrics:
    series = list(_series(comparison, metric, x_axis))
    ends = [s.points[-1][0] for s in series if len(s.points)]
    if not ends:
      continue
    half = statistics.median(ends) / 2
    late = [_after(s, half) for s in series]
    title, unit = TITLES.get(metric, metric), "log scale" if _is_positive(series) else ""
    yield _figure(title, unit, series, x_axis)
    if any(len(s.points) for s in late):
      yield _figure(title, f"second half{', ' if unit else ''}{unit}", late, x_axis)


def _figure(title: str, unit: str, series: list[Series], x_axis: str) -> str:
  chart = line_chart(series, scale="log" if _is_positive(series) else "linear", x_unit=UNITS[x_axis])
  caption = f"<b>{html.escape(title)}</b> <span>{unit}</span>"
  return f"<figure><figcaption>{caption}</figcaption>{chart}</figure>"


def _series(comparison: "Comparison", metric: str, x_axis: str) -> Iterator[Series]:
  """Runs as thin lines, then the means of groups, then held-out evaluations as dots; of many runs the means alone."""
  runs, groups = comparison.runs, comparison.groups
  bins = max(20, min(BINS, CURVE_POINTS // (2 * (len(runs) + len(groups)))))
  hover, each = len(groups) <= HOVERED_GROUPS, len(runs) <= MAX_RUNS
  heldout: list[Series] = []
  means: list[Series] = []
  for group in groups:
    color = _index(group) % COLORS
    if len(group.runs) == 1:
      name = f"{group.letter} {group.label}: {group.runs[0].name}"
    else:
      name = f"{group.letter} {group.label}, mean of {len(group.averaged)}"
      if each:
        for run in group.runs:
          yield Series(
            f"{group.letter} {run.name}", _points(run.curve(metric, x_axis), bins), "thin", color, hover=False
          )
    means.append(Series(name, _points(group.mean_curve(metric, x_axis), bins), "line", color, hover=hover))
    if each:
      curves = [(run.name, run.heldout_curve(metric, x_axis)) for run in group.runs]
    else:
      curves = [(name, group.mean_curve(metric, x_axis, heldout=True))]
    show = len(runs) <= HOVERED_RUNS
    heldout += [Series(f"{of}, held-out", _points(curve, bins), "points", color, hover=show) for of, curve in curves]
  yield from means
  yield from heldout


def _points(curve: Curve, bins: int) -> np.ndarray:
  return downsample(np.stack([curve.x, curve.y], -1), bins)


def _after(series: Series, x: float) -> Series:
  points = series.array()
  return dataclasses.replace(series, points=points[points[:, 0] >= x])


def _is_positive(series: list[Series]) -> bool:
  values = np.concatenate([s.array()[:, 1] for s in series])
  return len(values) > 0 and bool(values.min() > 0)
