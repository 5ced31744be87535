"""Line charts as inline SVG: what one report needs of a plotting library, so that none has to be installed.

Colours come from the page's style sheet by class name. Long series are thinned to the least and the greatest value of
each of 500 bins, so that a single spike survives; hovering shows the values themselves.
"""

import dataclasses
import html
import itertools
import math

WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 20, 10, 26
BINS = 500
BANDS = 120
SCALES = ("linear", "from zero", "log")


@dataclasses.dataclass(frozen=True)
class Series:
  """`points` is [(step, value)] with rising steps; a value is None where it was not finite. `style`: line or dots."""

  name: str
  points: list
  style: str = "line"


@dataclasses.dataclass(frozen=True)
class Axis:
  """Maps [low, high] onto pixels [start, end]."""

  low: float
  high: float
  start: float
  end: float
  log: bool = False

  def pixel(self, value):
    low, high, value = (
      (math.log10(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
    )
    return self.start + (value - low) / (high - low) * (self.end - self.start)


def line_chart(series, marks=(), scale="linear"):
  """An SVG element of `series` over steps, with a dashed vertical at each step of `marks`.

  `scale` is one of SCALES; log gives way to linear where a value is not positive.
  Steps whose value was not finite are ticks on the lower edge.
  """
  steps = [x for s in series for x, _ in s.points]
  values = [y for s in series for _, y in s.points if y is not None]
  if not values:
    return '<p class="empty">no finite value was logged</p>'
  x = Axis(*_widen(min(steps), max(steps), 1), LEFT, WIDTH - RIGHT)
  y = _value_axis(min(values), max(values), scale)
  parts = _grid(x, y)
  for index, s in enumerate(series):
    parts += _curve(s, x, y, f"s{index}")
    lost = sorted({round(x.pixel(step)) for step, value in s.points if value is None})
    parts += [f'<path class="lost" d="M{px} {y.start}v-6"/>' for px in lost]
  parts += _hover_bands(series, x)
  for step in marks:
    if x.low <= step <= x.high:
      path = f"M{x.pixel(step):.1f} {TOP}V{y.start}"
      parts.append(f'<path class="mark" d="{path}"><title>resumed from step {step:,}</title></path>')
  return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def thin(points, bins=BINS):
  """At most two points per bin of steps: the least and the greatest value; None only where a bin has nothing finite."""
  if len(points) <= 2 * bins:
    return list(points)
  first, width = points[0][0], (points[-1][0] - points[0][0]) / bins
  kept = []
  for _, group in itertools.groupby(points, key=lambda p: min(bins - 1, int((p[0] - first) / width))):
    group = list(group)
    finite = [p for p in group if p[1] is not None]
    extremes = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else {group[0]}
    kept += sorted(extremes)
  return kept


def ticks(low, high, count=5):
  """At most about `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart) from `low` to `high`."""
  raw = (high - low) / count
  power = 10.0 ** math.floor(math.log10(raw))
  step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low, high):
  """Round numbers from `low` to `high` for a logarithmic axis: the fewer decades, the more of them in each."""
  if high < 2 * low:
    return ticks(low, high)
  decades = math.log10(high / low)
  factors = (1,) if decades > 3 else (1, 2, 5) if decades > 1.2 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
  powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  found = [float(f"{m}e{p}") for p in powers[:: max(1, len(powers) // 6)] for m in factors]
  return [t for t in found if low <= t <= high]


def compact(value, largest=0):
  """Few significant digits and a unit: 1.5M, 20k, 0.04, 3e-5. Values of one axis share the unit of its `largest`."""
  size = max(abs(value), abs(largest))
  for unit, scale, least in (("T", 1e12, 1e12), ("G", 1e9, 1e9), ("M", 1e6, 1e6), ("k", 1e3, 1e4)):
    if least <= size < 1e15 and value:
      return f"{value / scale:.4g}{unit}"
  if value and not 1e-2 <= size < 1e15:
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
  return f"{value:.4g}" if size < 1000 else f"{value:,.0f}"


def _widen(low, high, least):
  flat = high - low <= max(1e-300, 1e-9 * max(abs(low), abs(high)))
  return (low - least, high + least) if flat else (low, high)


def _value_axis(low, high, scale):
  if scale == "log" and low > 0:
    return Axis(low / 1.1, high * 1.1, HEIGHT - BOTTOM, TOP, log=True)
  bottom, top = _widen(low, high, abs(low) * 0.1 or 1)
  pad = (top - bottom) * 0.05
  bottom = min(0, bottom) if scale == "from zero" else bottom - pad if low < 0 else max(0, bottom - pad)
  return Axis(bottom, top + pad, HEIGHT - BOTTOM, TOP)


def _grid(x, y):
  parts = []
  found = log_ticks(y.low, y.high) if y.log else ticks(y.low, y.high)
  for tick in found:
    py = y.pixel(tick)
    parts.append(f'<path class="grid" d="M{LEFT} {py:.1f}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text class="y" x="{LEFT - 7}" y="{py + 3.5:.1f}">{compact(tick, found[-1])}</text>')
  found = [tick for tick in ticks(x.low, x.high, 6) if tick.is_integer()]  # there is no half step
  for tick in found:
    parts.append(f'<text class="x" x="{x.pixel(tick):.1f}" y="{HEIGHT - 8}">{compact(tick, found[-1])}</text>')
  return [*parts, f'<path class="axis" d="M{LEFT} {y.start}H{WIDTH - RIGHT}"/>']


def _curve(series, x, y, name):
  """One path per stretch of finite values; points that no line would show are circles."""
  for finite, stretch in itertools.groupby(thin(series.points), key=lambda p: p[1] is not None):
    if not finite:
      continue
    pixels = [(f"{x.pixel(step):.1f}", f"{y.pixel(value):.1f}") for step, value in stretch]
    yield f'<path class="curve {name}" d="M{"L".join(f"{px} {py}" for px, py in pixels)}"/>'
    if series.style == "dots" or len(pixels) == 1:
      yield from (f'<circle class="{name}" cx="{px}" cy="{py}" r="2.6"/>' for px, py in pixels)


def _hover_bands(series, x):
  """Transparent columns over the chart; each one's title gives the last value of every series within it."""
  bands = {}
  for s in series:
    for step, value in s.points:
      band = int((step - x.low) / (x.high - x.low) * (BANDS - 1))
      bands.setdefault(band, {})[s.name] = (step, value)
  centres = [(x.pixel(max(step for step, _ in found.values())), found) for _, found in sorted(bands.items())]
  edges = [LEFT, *((a[0] + b[0]) / 2 for a, b in itertools.pairwise(centres)), WIDTH - RIGHT]
  for (left, right), (_, found) in zip(itertools.pairwise(edges), centres, strict=True):
    lines = [
      f"{name}: {'not finite' if value is None else f'{value:.6g}'} at step {step:,}"
      for name, (step, value) in found.items()
    ]
    title = html.escape("\n".join(lines))
    yield (
      f'<rect class="band" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM}">'
      f"<title>{title}</title></rect>"
    )
