"""Line charts as inline SVG: the little that a report needs, so that no plotting library has to be installed.

Colors come from the page's style sheet by class name. Long series are downsampled to the minimum and the maximum of
each of 500 bins, so that a single spike stays visible; hovering shows the values themselves.
"""

import dataclasses
import html
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 20, 10, 26
BINS = 500
HOVER_BANDS = 120
MAX_NAMES = 12  # on the axis of layers
SCALES = ("linear", "from zero", "log")

Point = tuple[float, float | None]  # (x, value); None where the value was not finite


@dataclasses.dataclass(frozen=True)
class Series:
  """A curve of a chart."""

  name: str
  points: Sequence[Point]  # by increasing x
  style: str = "line"  # or "dots", on a line, "points", without one, or "thin": a line that stands back
  color: int | None = None  # index of its color; None: its place in the chart
  hover: bool = True  # whether hovering shows its values; if not, its name alone


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
  series: Sequence[Series], marks: Sequence[int] = (), scale: str = "linear", x_names: Sequence[str] = (),
  x_unit: str = "step",
) -> str:  # fmt: skip
  """An SVG element of `series` over steps. Steps whose value was not finite are ticks on the lower edge.

  Args:
    marks: steps that get a dashed vertical line.
    scale: one of SCALES. A log scale becomes linear where a value is not positive.
    x_names: the chart is not over steps but over layers, of which these are the names.
    x_unit: what else the chart is over, as "tokens".
  """
  steps = [x for s in series for x, _ in s.points]
  values = [y for s in series for _, y in s.points if y is not None]
  if not values:
    return '<p class="empty">no finite value was logged</p>'
  first, last = _widen(min(steps), max(steps), 1)
  x = Axis(first, last, LEFT, WIDTH - RIGHT)
  y = _value_axis(min(values), max(values), scale)
  parts = _grid(x, y, x_names, whole=x_unit == "step")
  for index, s in enumerate(series):
    parts += _curve(s, x, y, f"s{index if s.color is None else s.color}")
    nonfinite = sorted({round(x.pixel(step)) for step, value in s.points if value is None})
    parts += [f'<path class="nonfinite" d="M{px} {y.start}v-6"/>' for px in nonfinite]
  parts += _hover_bands([s for s in series if s.hover], x, lambda at: _place(at, x_names, x_unit))
  for step in marks:
    if x.low <= step <= x.high:
      path = f"M{x.pixel(step):.1f} {TOP}V{y.start}"
      parts.append(f'<path class="mark" d="{path}"><title>resumed from step {step:,}</title></path>')
  return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def downsample(points: Sequence[Point], bins: int = BINS) -> list[Point]:
  """At most two points per bin of steps: the minimum and the maximum; None only where a bin has no finite value."""
  if len(points) <= 2 * bins:
    return list(points)
  first, width = points[0][0], (points[-1][0] - points[0][0]) / bins

  def bin_of(point):
    return min(bins - 1, int((point[0] - first) / width))

  def value_of(point):
    return point[1]

  sampled: list[Point] = []
  for _, group in itertools.groupby(points, key=bin_of):
    in_bin = list(group)
    finite = [point for point in in_bin if point[1] is not None]
    extremes = {min(finite, key=value_of), max(finite, key=value_of)} if finite else {in_bin[0]}
    sampled += sorted(extremes)
  return sampled


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


def _curve(series: Series, x: Axis, y: Axis, name: str) -> Iterator[str]:
  """One path per run of finite values. Points that no line would show are circles."""
  for is_finite, points in itertools.groupby(downsample(series.points), key=lambda point: point[1] is not None):
    if not is_finite:
      continue
    pixels = [(f"{x.pixel(step):.1f}", f"{y.pixel(value):.1f}") for step, value in points if value is not None]
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


def _hover_bands(series: Sequence[Series], x: Axis, place: Callable[[float], str]) -> Iterator[str]:
  """Transparent columns over the chart; the title of each gives the last value of every series within it.

  place: says in words where an x is.
  """
  bands: dict[int, dict[str, Point]] = {}
  for s in series:
    for step, value in s.points:
      band = int((step - x.low) / (x.high - x.low) * (HOVER_BANDS - 1))
      bands.setdefault(band, {})[s.name] = (step, value)
  if not bands:
    return
  last_values = [bands[band] for band in sorted(bands)]
  centers = [x.pixel(max(step for step, _ in values.values())) for values in last_values]
  edges = [LEFT, *((a + b) / 2 for a, b in itertools.pairwise(centers)), WIDTH - RIGHT]
  for (left, right), values in zip(itertools.pairwise(edges), last_values, strict=True):
    lines = [
      f"{name}: {'not finite' if value is None else f'{value:.6g}'} {place(step)}"
      for name, (step, value) in values.items()
    ]
    yield (
      f'<rect class="band" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM}">'
      f"{_title(chr(10).join(lines))}</rect>"
    )
