"""A progress bar on a terminal, one plain line every few seconds elsewhere."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 5


class StepProgress:
  """Shows `step` of `steps` with the newest metrics; a context manager."""

  def __init__(self, step: int, steps: int):
    self._steps, self._last_line = steps, float("-inf")
    # (step, time) of the first update that this process shows, so that the time left does not count compilation.
    self._first: tuple[int, float] | None = None
    console = Console()
    self._bar: Progress | None = None
    if console.is_terminal:
      # Fits 80 columns: rich would cut the time left from a wider line.
      columns = (
        MofNCompleteColumn(), BarColumn(8), TextColumn("{task.description}"), TimeRemainingColumn(), TextColumn("left"),
      )  # fmt: skip
      self._bar = Progress(*columns, console=console, refresh_per_second=4)
      self._task = self._bar.add_task("compiling", total=steps, completed=step)

  def __enter__(self) -> Self:
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *exception: object) -> None:
    if self._bar:
      self._bar.stop()

  def update(self, step: int, loss: float, bits_per_byte: float, tokens_per_second: float) -> None:
    """Shows the metrics of the last update; `step` is the number of completed updates."""
    metrics = f"loss {loss:.4f}  {bits_per_byte:.3f} bits/byte  {tokens_per_second:,.0f} tok/s"
    now = time.monotonic()
    self._first = self._first or (step, now)
    if self._bar:
      self._bar.update(self._task, completed=step, description=metrics)
    elif now - self._last_line >= LINE_SECONDS or step == self._steps:
      self._last_line = now
      first_step, first_time = self._first
      time_left = "-:--:--"
      if step > first_step:
        time_left = format_duration((now - first_time) / (step - first_step) * (self._steps - step))
      print(f"step {step}/{self._steps}  {metrics}  {time_left} left", flush=True)

  def print(self, text: str) -> None:
    """Prints a line, above the bar where there is one."""
    if self._bar:
      self._bar.console.print(text, markup=False, highlight=False)
    else:
      print(text, flush=True)


def format_duration(seconds: float) -> str:
  """Seconds as h:mm:ss."""
  minutes, seconds = divmod(round(seconds), 60)
  return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
