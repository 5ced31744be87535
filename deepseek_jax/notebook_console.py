"""The console of a run in a notebook: progress and the loss so far, redrawn in place below the cell."""

import base64
import contextlib
import html
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from deepseek_jax.console import Console
from deepseek_jax.training.metrics import Histograms
from deepseek_jax.training.plot import HEIGHT, WIDTH, Point, Series, line_chart

REDRAW_SECONDS = 1.0
# An image has no part in the style of the notebook around it, so that it brings its own background.
STYLE = """
svg { background: #fff; font: 11px system-ui, sans-serif } text { fill: #667085 } .y { text-anchor: end } .x { text-anchor: middle }
path { fill: none; stroke: #e4e7ec } path.axis { stroke: #98a2b3 } path.nonfinite { stroke: #e03131 }
path.curve { stroke-width: 1.6; stroke-linejoin: round } path.s0 { stroke: #4361ee } path.s1 { stroke: #e8590c }
circle.s0 { fill: #4361ee } circle.s1 { fill: #e8590c } .band { fill: none }
@media (prefers-color-scheme: dark) { svg { background: #171b24 } text { fill: #98a2b3 } path { stroke: #2a303c } }
"""


def in_notebook() -> bool:
  """Whether this process is the kernel of a notebook, which shows HTML."""
  ipython = sys.modules.get("IPython")
  shell = ipython.get_ipython() if ipython else None
  return hasattr(shell, "kernel")


class NotebookConsole(Console):
  """Lines as text; the progress of steps as a bar above a chart of the loss, which `metrics_writer` collects."""

  def __init__(self) -> None:
    super().__init__(bars=False)
    self._curve = _LossCurve()

  def metrics_writer(self, folder: str, step: int) -> "_LossCurve":
    """The writer to give to the run, a `metrics.WriterFactory`."""
    return self._curve

  @contextlib.contextmanager
  def step_progress(self, step: int, steps: int) -> Iterator[Callable[[int, str], None]]:
    """As `Console.step_progress`, in a display that is redrawn every REDRAW_SECONDS and at the end."""
    from IPython.display import HTML, display

    text, drawn = "compiling", time.monotonic()
    handle = display(HTML(self._page(step, steps, text)), display_id=True)

    def update(completed: int, about_step: str) -> None:
      nonlocal step, text, drawn
      step, text = completed, about_step
      if time.monotonic() - drawn > REDRAW_SECONDS:
        handle.update(HTML(self._page(step, steps, text)))
        drawn = time.monotonic()

    def redraw() -> None:
      handle.update(HTML(self._page(step, steps, text)))

    self._curve.on_close = redraw  # the last evaluation follows the last step
    try:
      yield update
    finally:
      redraw()

  def _page(self, step: int, steps: int, text: str) -> str:
    bar = f'<progress value="{step}" max="{steps}" style="width: 160px; vertical-align: middle"></progress>'
    return f"<div>{bar} step {step:,} of {steps:,} &nbsp; {html.escape(text)}</div>{self._curve.image()}"


class _LossCurve:
  """A MetricsWriter that keeps the bits per byte of training and of held-out evaluations, to draw them."""

  def __init__(self) -> None:
    self._train: list[Point] = []
    self._heldout: list[Point] = []
    self.on_close: Callable[[], None] = lambda: None

  def write(self, step: int, values: Mapping[str, Any], histograms: Histograms) -> None:
    """Keeps the point of an update."""
    self._train.append((step, _finite(values["bits_per_byte"])))

  def event(self, name: str, step: int, **values: Any) -> None:
    """Keeps the point of an evaluation."""
    if name == "eval":
      self._heldout.append((step, _finite(values["bits_per_byte"])))

  def close(self) -> None:
    """Calls `on_close`; what was kept is still drawn."""
    self.on_close()

  def image(self) -> str:
    """An <img> of both curves; empty before the first point."""
    # Copies: the thread of the writers appends meanwhile.
    series = [Series("train", list(self._train)), Series("held-out", list(self._heldout), "dots")]
    if not series[0].points:
      return ""
    chart = line_chart(series, scale="log").replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    chart = chart.replace(">", f"><style>{STYLE}</style>", 1)
    data = base64.b64encode(chart.encode()).decode()
    label = "bits per byte over steps: training (line), held-out (dots)"
    return (
      f'<img alt="{label}" width="{WIDTH}" height="{HEIGHT}" src="data:image/svg+xml;base64,{data}">'
      f'<div style="font-size: 12px">{label}</div>'
    )


def _finite(value: Any) -> float | None:
  value = float(value)
  return value if abs(value) < float("inf") else None
