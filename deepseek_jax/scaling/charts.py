"""Charts of the scaling report as inline SVG: dots, curves and bands over logarithmic axes, in the style of the run's report."""

import dataclasses
import html
import math
from collections.abc import Iterator, Sequence

from deepseek_jax.training.plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, format_compact, log_ticks, ticks

COLORS = 8  # classes s0 to s7 of the style sheet
Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Layer:
  """Something drawn on a chart.

  Attributes:
    kind: line, dashed, dots, rings (hollow dots) or band.
    points: (x, y); of a band (x, low, high).
    color: index of the series' color.
    names: of the dots, shown beside their values on hovering.
  """

  name: str
  kind: str
  points: Sequence[tuple[float, ...]]
  color: int = 0
  names: Sequence[str] = ()


def chart(layers: Sequence[Layer], log_x: bool = True, log_y: bool = False) -> str:
  """An SVG element of `layers`; without axes where nothing can be drawn."""
  finite = [
    dataclasses.replace(layer, points=[p for p in layer.points if all(math.isfinite(v) for v in p)]) for layer in layers
  ]
  xs = [p[0] for layer in finite for p in layer.points]
  ys = [y for layer in finite for p in layer.points for y in p[1:]]
  if not xs:
    return '<p class="empty">no runs for this chart</p>'
  x = _axis(min(xs), max(xs), log_x, LEFT, WIDTH - RIGHT)
  y = _axis(min(ys), max(ys), log_y, HEIGHT - BOTTOM, TOP)
  parts = list(_grid(x, y))
  for layer in sorted(finite, key=lambda item: item.kind != "band"):
    parts += _draw(layer, x, y)
  return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def _axis(low: float, high: float, log: bool, start: float, end: float) -> Axis:
  if log and low > 0:
    margin = max((high / low) ** 0.04, 1.02)
    return Axis(low / margin, high * margin, start, end, log=True)
  margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
  return Axis(low - margin, high + margin, start, end)


def _grid(x: Axis, y: Axis) -> Iterator[str]:
  y_ticks = log_ticks(y.low, y.high) if y.log else ticks(y.low, y.high)
  for tick in y_ticks:
    py = y.pixel(tick)
    yield f'<path class="grid" d="M{LEFT} {py:.1f}H{WIDTH - RIGHT}"/>'
    yield f'<text class="y" x="{LEFT - 7}" y="{py + 3.5:.1f}">{format_compact(tick, y_ticks[-1] if not y.log else 0)}</text>'
  x_ticks = log_ticks(x.low, x.high) if x.log else ticks(x.low, x.high, 6)
  last = -math.inf
  for tick in x_ticks:
    px = x.pixel(tick)
    if px - last < 42:  # labels must not overlap
      continue
    last = px
    yield f'<text class="x" x="{px:.1f}" y="{HEIGHT - 8}">{_short(tick)}</text>'
  yield f'<path class="axis" d="M{LEFT} {y.start}H{WIDTH - RIGHT}"/>'


def _short(value: float) -> str:
  return f"{value:.2g}".replace("e+0", "e").replace("e+", "e") if value >= 1e4 else format_compact(value)


def _draw(layer: Layer, x: Axis, y: Axis) -> Iterator[str]:
  name = f"s{layer.color % COLORS}"
  if layer.kind == "band":
    upper = [f"{x.pixel(p[0]):.1f} {y.pixel(p[2]):.1f}" for p in layer.points]
    lower = [f"{x.pixel(p[0]):.1f} {y.pixel(p[1]):.1f}" for p in reversed(layer.points)]
    if upper:
      yield f'<path class="area {name}" d="M{"L".join(upper + lower)}Z"/>'
  elif layer.kind in ("line", "dashed"):
    pixels = [f"{x.pixel(p[0]):.1f} {y.pixel(p[1]):.1f}" for p in layer.points]
    if pixels:
      yield f'<path class="curve {layer.kind} {name}" d="M{"L".join(pixels)}"/>'
  else:
    for i, p in enumerate(layer.points):
      label = f"{layer.names[i]}: " if i < len(layer.names) else f"{layer.name}: " if layer.name else ""
      title = html.escape(f"{label}{p[0]:.4g}, {p[1]:.5g}")
      shape = f'class="{"ring " if layer.kind == "rings" else ""}{name}"'
      radius = 4.2 if layer.kind == "rings" else 2.8
      yield f'<circle {shape} cx="{x.pixel(p[0]):.1f}" cy="{y.pixel(p[1]):.1f}" r="{radius}"><title>{title}</title></circle>'
