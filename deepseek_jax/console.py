"""What a program shows to people: lines of text, and progress.

One console is current. A program that calls the trainer gives it its own, to silence or redirect all that a run shows.
"""

import contextlib
import contextvars
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:  # imported below where it is used: --help and config errors need no rich
  import rich.console

LINE_SECONDS = 5


class Console:
  """Shows lines and progress on text streams: bars on a terminal, plain lines elsewhere.

  A subclass may override `print` alone, which gets every line. It sets `bars` to False then.

  Args:
    out, err: the streams. None: stdout and stderr, as they are at the moment of printing.
    bars: whether to show progress bars on a terminal.
  """

  def __init__(self, out: TextIO | None = None, err: TextIO | None = None, bars: bool = True):
    self._out, self._err, self._bars = out, err, bars
    self._bar_console: rich.console.Console | None = None  # while a bar of steps is shown

  def print(self, text: str, err: bool = False) -> None:
    """Prints a line or several to `out`, or to `err`; above the bar where there is one."""
    if self._bar_console and not err:
      self._bar_console.print(text, markup=False, highlight=False)
    else:
      stream = self._stream(err)
      try:
        print(text, file=stream, flush=True)
      except BrokenPipeError:  # nobody reads any more, as after `| head`: a run goes on, its files have the metrics
        discard_output(stream)

  @contextlib.contextmanager
  def step_progress(self, step: int, steps: int) -> Iterator[Callable[[int, str], None]]:
    """Shows how many of `steps` are done, `step` at the start, on `out`.

    Yields update(completed steps, text about the last one). Without a bar it prints a line every LINE_SECONDS.
    """
    terminal = self._terminal(err=False)
    if not terminal:
      yield StepLines(self, steps).update
      return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    # Fits 80 columns: rich would cut the time left from a wider line.
    columns = (
      MofNCompleteColumn(), BarColumn(8), TextColumn("{task.description}"), TimeRemainingColumn(), TextColumn("left"),
    )  # fmt: skip
    with Progress(*columns, console=terminal, refresh_per_second=4) as bar:
      self._bar_console = terminal
      task = bar.add_task("compiling", total=steps, completed=step)
      try:
        yield lambda completed, text: bar.update(task, completed=completed, description=text)
      finally:
        self._bar_console = None

  @contextlib.contextmanager
  def byte_progress(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how many of `total` bytes are done, on `err`. Yields update(bytes done).

    Without a bar it prints one line at the start.
    """
    with self._progress(description, total, format_bytes(total), "DownloadColumn") as update:
      yield update

  @contextlib.contextmanager
  def count_progress(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
    """As `byte_progress`, of `total` things that are counted."""
    with self._progress(description, total, f"{total:,}", "MofNCompleteColumn") as update:
      yield update

  @contextlib.contextmanager
  def _progress(
    self, description: str, total: int, formatted_total: str, column: str
  ) -> Iterator[Callable[[int], None]]:
    """Yields update(done): of a bar on `err` with rich's `column` of that name, or of nothing after one line."""
    terminal = self._terminal(err=True)
    if not terminal:
      self.print(f"{description} ({formatted_total})", err=True)
      yield lambda done: None
      return
    from rich import progress

    columns = (
      progress.TextColumn("{task.description}"), progress.BarColumn(), getattr(progress, column)(),
      progress.TimeRemainingColumn(),
    )  # fmt: skip
    with progress.Progress(*columns, console=terminal) as bar:
      task = bar.add_task(description, total=total)
      yield lambda done: bar.update(task, completed=done)

  def _stream(self, err: bool) -> TextIO:
    return (self._err or sys.stderr) if err else (self._out or sys.stdout)

  def _terminal(self, err: bool) -> "rich.console.Console | None":
    """Rich's console of the stream if it is a terminal that shows bars."""
    if not self._bars:
      return None
    import rich.console

    console = rich.console.Console(file=self._stream(err))
    return console if console.is_terminal else None


class SilentConsole(Console):
  """Shows nothing."""

  def __init__(self) -> None:
    super().__init__(bars=False)

  def print(self, text: str, err: bool = False) -> None:
    """Does nothing."""


class StepLines:
  """Progress as plain lines, one every LINE_SECONDS and one for the last step, with the time left."""

  def __init__(self, console: Console, steps: int):
    self._console, self._steps, self._last_line = console, steps, float("-inf")
    # (step, time) of the first update, so that the time left does not count compilation.
    self._first: tuple[int, float] | None = None

  def update(self, step: int, text: str) -> None:
    """Shows `text` about the last of `step` completed steps."""
    now = time.monotonic()
    self._first = self._first or (step, now)
    if now - self._last_line < LINE_SECONDS and step != self._steps:
      return
    self._last_line = now
    first_step, first_time = self._first
    time_left = "-:--:--"
    if step > first_step:
      time_left = format_duration((now - first_time) / (step - first_step) * (self._steps - step))
    self._console.print(f"step {step}/{self._steps}  {text}  {time_left} left")


def discard_output(stream: TextIO) -> None:
  """Drops what is written to `stream` from now on, which has a file descriptor."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def printable(text: str) -> str:
  """`text` in one line without control characters, which a terminal would obey: as their Unicode pictures, or as �."""
  pictures = {code: chr(0x2400 + code) for code in range(32)} | {127: "\u2421"}
  return "".join(c if c.isprintable() else pictures.get(ord(c), "\ufffd") for c in text)


def format_bytes(size: float) -> str:
  """A number of bytes in the largest unit of 1024s of which it has one at least, with three digits."""
  for unit, unit_size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
    if (scaled := size / unit_size) >= 1:
      return f"{scaled:,.{max(0, 2 - int(math.log10(scaled)))}f} {unit}"
  return f"{size:.0f} B"


def format_gib(size: float, digits: int) -> str:
  """A number of bytes in GiB with that many digits, without the unit; with a smaller unit where that would be zero."""
  text = f"{size / 2**30:,.{digits}f}"
  return format_bytes(size) if size and not float(text.replace(",", "")) else text


def format_duration(seconds: float) -> str:
  """Seconds as h:mm:ss."""
  minutes, seconds = divmod(round(seconds), 60)
  return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


_DEFAULT = Console()
_current: contextvars.ContextVar[Console | None] = contextvars.ContextVar("console", default=None)


def current_console() -> Console:
  """The console that is set, or one on stdout and stderr."""
  return _current.get() or _DEFAULT


@contextlib.contextmanager
def set_console(console: Console) -> Iterator[Console]:
  """Makes `console` the current one during the block, in this thread."""
  token = _current.set(console)
  try:
    yield console
  finally:
    _current.reset(token)


class _ConsoleHandler(logging.Handler):
  """Shows log records on the current console."""

  def emit(self, record: logging.LogRecord) -> None:
    current_console().print(record.getMessage(), err=True)


@contextlib.contextmanager
def log_to_console() -> Iterator[None]:
  """Shows what this package logs, as a kernel's fallback to XLA, on the current console during the block, and only there.

  Libraries give Python's root logger a handler that writes to stderr.
  """
  logger, handler = logging.getLogger(__package__), _ConsoleHandler()
  propagate, logger.propagate = logger.propagate, False
  logger.addHandler(handler)
  try:
    yield
  finally:
    logger.removeHandler(handler)
    logger.propagate = propagate
