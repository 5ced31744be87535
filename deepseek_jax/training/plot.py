"""Line charts as inline SVG: the little that a report needs, so that no plotting library has to be installed.

Colors come from the page's style sheet by class name. Long series are downsampled to the minimum and the maximum of
each of 500 bins, so that a single spike stays visible; hovering shows the values themselves.
"""

import dataclasses
import html
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 20, 10, 26
BINS = 500
HOVER_BANDS = 120
MAX_NAMES = 12  # on the axis of layers
SCALES = ("linear", "from zero", "log")

Point = tuple[float, float | None]  # (x, value); None where the value was not finite


@dataclasses.dataclass(frozen=True)
class Series:
  """A curve of a chart.

  points: by increasing x, a sequence of them or a float64 array [n, 2] with NaN for None.
  style: "line", "dots" for a line with dots, "points" without a line, "thin" for a line that stands back, or "rings" for
    rings without a line, around points of another curve.
  color: index of its color; None: its place in the chart.
  hover: whether hovering shows its values; if not, its name alone.
  """

  name: str
  points: Sequence[Point] | np.ndarray
  style: str = "line"
  color: int | None = None
  hover: bool = True

  def array(self) -> np.ndarray:
    """The points as a float64 array [n, 2]; NaN where a value was not finite."""
    return np.asarray(self.points, np.float64).reshape(-1, 2)


@dataclasses.dataclass(frozen=True)
class Axis:
  """Maps [low, high] onto pixels [start, end]."""

  low: float
  high: float
  start: float
  end: float
  log: bool = False

  def pixel(self, value: float) -> float:
    """Position of `value`, in pixels."""
    low, high = self.low, self.high
    if self.log:
      low, high, value = math.log10(low), math.log10(high), math.log10(value)
    return self.start + (value - low) / (high - low) * (self.end - self.start)


def line_chart(
  series: Sequence[Series], marks: Mapping[int, str] | None = None, scale: str = "linear", x_names: Sequence[str] = (),
  x_unit: str = "step",
) -> str:  # fmt: skip
  """An SVG element of `series` over steps. Steps whose value was not finite are ticks on the lower edge.

  Args:
    marks: {step: title} of dashed vertical lines.
    scale: one of SCALES. A log scale becomes linear where a value is not positive.
    x_names: the chart is not over steps but over layers, of which these are the names.
    x_unit: what else the chart is over, as "tokens".
  """
  arrays = [s.array() for s in series]
  ranges = [_finite_range(points[:, 1]) for points in arrays]
  if not any(ranges):
    return '<p class="empty">no finite value was logged</p>'
  steps = [points[i, 0] for points in arrays if len(points) for i in (0, -1)]
  lows, highs = zip(*filter(None, ranges), strict=True)
  first, last = _widen(min(steps), max(steps), 1)
  x = Axis(first, last, LEFT, WIDTH - RIGHT)
  y = _value_axis(min(lows), max(highs), scale)
  parts = _grid(x, y, x_names, whole=x_unit == "step")
  for index, (s, points) in enumerate(zip(series, arrays, strict=True)):
    parts += _curve(s, points, x, y, f"s{index if s.color is None else s.color}")
    nonfinite = sorted({round(x.pixel(step)) for step in points[np.isnan(points[:, 1]), 0]})
    parts += [f'<path class="nonfinite" d="M{px} {y.start}v-6"/>' for px in nonfinite]
  hovered = [(s.name, points) for s, points in zip(series, arrays, strict=True) if s.hover]
  parts += _hover_bands(hovered, x, lambda at: _place(at, x_names, x_unit))
  for step, title in (marks or {}).items():
    if x.low <= step <= x.high:
      path = f"M{x.pixel(step):.1f} {TOP}V{y.start}"
      parts.append(f'<path class="mark" d="{path}"><title>{html.escape(title)}</title></path>')
  return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def downsample(points: np.ndarray, bins: int = BINS) -> np.ndarray:
  """At most two of `points` [n, 2] per bin of steps: the minimum and the maximum; NaN only where a bin has nothing else."""
  if len(points) <= 2 * bins:
    return points
  steps, values = points[:, 0], np.ascontiguousarray(points[:, 1])
  edges = np.searchsorted(steps, np.linspace(steps[0], steps[-1], bins + 1)[1:-1])
  kept: list[int] = []
  for start, end in itertools.pairwise([0, *edges.tolist(), len(points)]):
    if start == end:
      continue
    in_bin = values[start:end]
    extremes = {start + int(in_bin.argmin()), start + int(in_bin.argmax())}
    if math.isnan(values[next(iter(extremes))]):  # argmin and argmax find a NaN first
      finite = start + np.flatnonzero(~np.isnan(in_bin))
      extremes = {finite[values[finite].argmin()], finite[values[finite].argmax()]} if len(finite) else {start}
    kept += sorted(extremes)
  return points[kept]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
  """At most about `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart) from `low` to `high`."""
  min_step = (high - low) / count
  power = 10.0 ** math.floor(math.log10(min_step))
  step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= min_step * 0.999)
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
  """Round numbers from `low` to `high` for a logarithmic axis: the fewer decades, the more of them in each."""
  if high < 2 * low:
    return ticks(low, high)
  decades = math.log10(high / low)
  factors: tuple[float, ...] = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
  if decades > 3:
    factors = (1,)
  elif decades > 1.2:
    factors = (1, 2, 5)
  powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  candidates = [float(f"{m}e{p}") for p in powers[:: max(1, len(powers) // 6)] for m in factors]
  return [tick for tick in candidates if low <= tick <= high]


def format_compact(value: float, largest: float = 0) -> str:
  """Few significant digits and a unit: 1.5M, 20k, 0.04, 3e-5. Values of one axis share the unit of its `largest`."""
  size = max(abs(value), abs(largest))
  for unit, scale, minimum in (("T", 1e12, 1e12), ("G", 1e9, 1e9), ("M", 1e6, 1e6), ("k", 1e3, 1e4)):
    if minimum <= size < 1e15 and value:
      return f"{value / scale:.4g}{unit}"
  if value and not 1e-2 <= size < 1e15:
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
  return f"{value:.4g}" if size < 1000 else f"{value:,.0f}"


def _finite_range(values: np.ndarray) -> tuple[float, float] | None:
  """(smallest, largest) of what is finite; None where nothing is."""
  low, high = (float(reduce(values, initial=np.nan)) for reduce in (np.fmin.reduce, np.fmax.reduce))
  return None if math.isnan(low) else (low, high)


def _widen(low: float, high: float, margin: float) -> tuple[float, float]:
  """(low, high), with `margin` on both sides where they are nearly equal."""
  is_flat = high - low <= max(1e-300, 1e-9 * max(abs(low), abs(high)))
  return (low - margin, high + margin) if is_flat else (low, high)


def _value_axis(low: float, high: float, scale: str) -> Axis:
  if scale == "log" and low > 0:
    return Axis(low / 1.1, high * 1.1, HEIGHT - BOTTOM, TOP, log=True)
  bottom, top = _widen(low, high, abs(low) * 0.1 or 1)
  pad = (top - bottom) * 0.05
  if scale == "from zero":
    bottom = min(0, bottom)
  else:
    bottom = bottom - pad if low < 0 else max(0, bottom - pad)
  return Axis(bottom, top + pad, HEIGHT - BOTTOM, TOP)


def _grid(x: Axis, y: Axis, x_names: Sequence[str], whole: bool) -> list[str]:
  parts = []
  y_ticks = log_ticks(y.low, y.high) if y.log else ticks(y.low, y.high)
  for tick in y_ticks:
    py = y.pixel(tick)
    parts.append(f'<path class="grid" d="M{LEFT} {py:.1f}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text class="y" x="{LEFT - 7}" y="{py + 3.5:.1f}">{format_compact(tick, y_ticks[-1])}</text>')
  labels: dict[float, str]
  if x_names:
    labels = dict(list(enumerate(x_names))[:: math.ceil(len(x_names) / MAX_NAMES)])
  else:
    x_ticks = [tick for tick in ticks(x.low, x.high, 6) if tick.is_integer() or not whole]  # steps are integers
    labels = {tick: format_compact(tick, x_ticks[-1]) for tick in x_ticks}
  for tick, label in labels.items():
    parts.append(f'<text class="x" x="{x.pixel(tick):.1f}" y="{HEIGHT - 8}">{html.escape(label)}</text>')
  return [*parts, f'<path class="axis" d="M{LEFT} {y.start}H{WIDTH - RIGHT}"/>']


def _curve(series: Series, points: np.ndarray, x: Axis, y: Axis, name: str) -> Iterator[str]:
  """One path per run of finite values. Points that no line would show are circles."""
  if series.style == "rings":
    for step, value in downsample(points).tolist():
      yield f'<circle class="ring" cx="{x.pixel(step):.1f}" cy="{y.pixel(value):.1f}" r="5"/>'
    return
  for is_finite, run in itertools.groupby(downsample(points).tolist(), key=lambda point: not math.isnan(point[1])):
    if not is_finite:
      continue
    pixels = [(f"{x.pixel(step):.1f}", f"{y.pixel(value):.1f}") for step, value in run]
    thin, end = " thin" if series.style == "thin" else "", "/>" if series.hover else f">{_title(series.name)}</path>"
    if series.style != "points":
      yield f'<path class="curve {name}{thin}" d="M{"L".join(f"{px} {py}" for px, py in pixels)}"{end}'
    if series.style in ("dots", "points") or len(pixels) == 1:
      yield from (f'<circle class="{name}" cx="{px}" cy="{py}" r="2.6"/>' for px, py in pixels)


def _title(text: str) -> str:
  return f"<title>{html.escape(text)}</title>"


def _place(x: float, x_names: Sequence[str], x_unit: str) -> str:
  if x_names:
    return f"in layer {x_names[int(x)]}"
  return f"at step {x:,.0f}" if x_unit == "step" else f"at {format_compact(x)} {x_unit}"


def _hover_bands(hovered: Sequence[tuple[str, np.ndarray]], x: Axis, place: Callable[[float], str]) -> Iterator[str]:
  """Transparent columns over the chart; the title of each gives the last value of every series within it.

  Args:
    hovered: (name, points [n, 2]) of each series. place: says in words where an x is.
  """
  bands: dict[int, dict[str, tuple[float, float]]] = {}
  for name, points in hovered:
    of_points = ((points[:, 0] - x.low) / (x.high - x.low) * (HOVER_BANDS - 1)).astype(np.int64)
    lasts = np.flatnonzero(np.diff(of_points, append=HOVER_BANDS))
    for band, step, value in zip(of_points[lasts].tolist(), *points[lasts].T.tolist(), strict=True):
      bands.setdefault(band, {})[name] = (step, value)
  if not bands:
    return
  last_values = [bands[band] for band in sorted(bands)]
  centers = [x.pixel(max(step for step, _ in values.values())) for values in last_values]
  edges = [LEFT, *((a + b) / 2 for a, b in itertools.pairwise(centers)), WIDTH - RIGHT]
  for (left, right), values in zip(itertools.pairwise(edges), last_values, strict=True):
    lines = [
      f"{name}: {'not finite' if math.isnan(value) else f'{value:.6g}'} {place(step)}"
      for name, (step, value) in values.items()
    ]
    title = _title("\n".join(lines))
    yield (
      f'<rect class="band" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM}">'
      f"{title}</rect>"
    )
