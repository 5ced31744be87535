"""A progress bar on a terminal, one plain line every few seconds elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 5


class StepProgress:
  """Shows `step` of `steps` with the newest numbers; a context manager."""

  def __init__(self, step, steps):
    self._steps, self._shown = steps, float("-inf")
    self._first = None  # (step, time) of the first update: compilation is no part of the pace
    console = Console()
    self._bar = None
    if console.is_terminal:
      # Fits 80 columns: elsewhere rich would cut the time left.
      columns = (
        MofNCompleteColumn(), BarColumn(8), TextColumn("{task.description}"), TimeRemainingColumn(), TextColumn("left"),
      )  # fmt: skip
      self._bar = Progress(*columns, console=console, refresh_per_second=4)
      self._task = self._bar.add_task("compiling", total=steps, completed=step)

  def __enter__(self):
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *exception):
    if self._bar:
      self._bar.stop()

  def update(self, step, loss, bits_per_byte, tokens_per_second):
    """After `step` completed updates."""
    numbers = f"loss {loss:.4f}  {bits_per_byte:.3f} bits/byte  {tokens_per_second:,.0f} tok/s"
    now = time.monotonic()
    self._first = self._first or (step, now)
    if self._bar:
      self._bar.update(self._task, completed=step, description=numbers)
    elif now - self._shown >= LINE_SECONDS or step == self._steps:
      self._shown = now
      first, started = self._first
      left = duration((now - started) / (step - first) * (self._steps - step)) if step > first else "-:--:--"
      print(f"step {step}/{self._steps}  {numbers}  {left} left", flush=True)

  def say(self, text):
    """A line above the bar."""
    if self._bar:
      self._bar.console.print(text, markup=False, highlight=False)
    else:
      print(text, flush=True)


def duration(seconds) -> str:
  """Seconds as h:mm:ss."""
  minutes, seconds = divmod(round(seconds), 60)
  return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
