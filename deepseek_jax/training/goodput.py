"""Goodput: where the wall time of a run went, over all of its restarts. `goodput.jsonl` has the records.

One JSON object a line, with `event`, `time` (Unix seconds) and `step`:

- start: a process began at `time`, and continues from `step`.
- spent: until `time` it spent `seconds`, {phase: seconds since its last record}, and finished `step`.
- end: the run ended for a `reason`.

Records are never cut on a resume, but for a torn last line. What no record tells follows from the order: a gap before a
start is time that the run was down, and the steps past a start's `step` were trained again.
"""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.errors import DataError, WriteError
from deepseek_jax.training.clock import PHASES, PhaseClock
from deepseek_jax.training.metrics import GOODPUT, AppendFile, keep_lines, read_jsonl
from deepseek_jax.training.page import format_duration
from deepseek_jax.training.run_records import is_number

# {category: the words for it}; phases of the clock, and what the records of restarts tell.
CATEGORIES = {
  "step": "steps",
  "data": "data wait",
  "init": "start and end",
  "open_data": "opening data",
  "compile": "compilation",
  "restore": "restore",
  "check": "check of devices",
  "eval": "evaluation",
  "checkpoint": "save",
  "sample": "sample",
  "lost": "steps that a restart trained again",
  "down": "down",
}
RECORD_SECONDS, RECORD_FRACTION = 10.0, 0.001  # between records: the larger one of the two, the second of the age


class GoodputWriter:
  """Writes the records of this process. Without a call of `open` it does nothing, as on all processes but the first.

  clock: of the run.
  """

  def __init__(self, clock: PhaseClock):
    self.clock = clock
    self._file: AppendFile | None = None
    self._written = dict.fromkeys(PHASES, 0.0)  # seconds that records have
    self._next_record = 0.0  # in seconds since the start

  def open(self, folder: str | os.PathLike[str]) -> None:
    """Opens the file in the local `folder` of the run, and records a start from the clock's step, unless it is open.

    Raises OSError where it cannot be written, and DataError where it holds something else.
    """
    if self._file:
      return
    path = os.path.join(folder, GOODPUT)
    os.makedirs(folder, exist_ok=True)
    keep_lines(path, lambda line: True)  # without a torn last line
    self._file = AppendFile(path)
    self._append("start", time.time() - (time.monotonic() - self.clock.started))

  def record(self, at_once: bool = True) -> None:
    """Records what was spent since the last record, up to now and the clock's step; not `at_once`: if that is long ago."""
    seconds = self.clock.seconds()
    age = sum(seconds.values())
    if not self._file or not (at_once or age >= self._next_record):
      return
    spent = {phase: round(seconds[phase] - self._written[phase], 6) for phase in PHASES}
    self._append("spent", time.time(), seconds={phase: value for phase, value in spent.items() if value})
    self._written = seconds
    self._next_record = age + max(RECORD_SECONDS, RECORD_FRACTION * age)

  def end(self, reason: str) -> None:
    """Records the end of the run."""
    self.record()
    if self._file:
      self._append("end", time.time(), reason=reason)

  def close(self) -> None:
    """Records what was spent since the last record, and closes the file. A disk that is full loses that."""
    with contextlib.suppress(WriteError):
      self.record()
    if self._file:
      self._file.close()
      self._file = None

  def _append(self, event: str, at: float, **values: Any) -> None:
    assert self._file
    line = {"event": event, "time": round(at, 6), "step": self.clock.step, **values}
    try:
      self._file.append(json.dumps(line).encode() + b"\n")
    except OSError as error:
      raise WriteError(f"{self._file.path} cannot be written: {error.strerror}") from None


@dataclasses.dataclass(frozen=True)
class Goodput:
  """Where the wall time of a run went, from its first start to its last record.

  Attributes:
    seconds: {one of CATEGORIES: seconds}, which add up to the wall time.
    starts: how often the run was started.
  """

  seconds: Mapping[str, float]
  starts: int

  @property
  def total(self) -> float:
    """Wall time in seconds."""
    return sum(self.seconds.values())

  @property
  def fraction(self) -> float:
    """Of the wall time, what went into steps that count."""
    return self.seconds["step"] / self.total if self.total else 0.0

  def __str__(self) -> str:
    """In words, the largest first."""
    if not self.total:
      return "goodput: no time was recorded"
    shares = sorted(self.seconds.items(), key=lambda item: -item[1])
    texts = [f"{CATEGORIES[name]} {value / self.total:.1%}" for name, value in shares if value / self.total >= 0.0005]
    restarts = f"; {self.starts} starts" if self.starts > 1 else ""
    return f"goodput {self.fraction:.1%} of {format_duration(self.total)}: {', '.join(texts)}{restarts}"


def read_goodput(folder: str | os.PathLike[str]) -> Goodput:
  """The Goodput of the run in the local `folder`, which may be going on. Raises DataError for a file that is damaged."""
  path = os.path.join(folder, GOODPUT)
  try:
    return account(read_jsonl(path))
  except (AttributeError, KeyError, TypeError) as error:
    raise DataError(
      f"{path}: expected the records of a run, got one without its fields ({type(error).__name__}: {error}); move the file away"
    ) from None


def account(records: Sequence[Mapping[str, Any]]) -> Goodput:
  """The Goodput of the records of a run, in order.

  - Before a start: the time since the last record is down, unless the run had finished.
  - What steps past the step of a start took, with their waits for data, is lost.
  """
  seconds, starts = dict.fromkeys(CATEGORIES, 0.0), 0
  trained: list[tuple[int, float, float]] = []  # (step, seconds of steps, of data) of the records that count
  last_time, has_finished = None, False
  for record in records:
    event, step = record["event"], record["step"]
    if event == "start":
      starts += 1
      if last_time is not None and not has_finished:
        seconds["down"] += max(record["time"] - last_time, 0.0)  # two machines' clocks may differ
      for _, in_steps, in_data in (part for part in trained if part[0] > step):
        seconds["step"] -= in_steps
        seconds["data"] -= in_data
        seconds["lost"] += in_steps + in_data
      trained, has_finished = [part for part in trained if part[0] <= step], False
    elif event == "spent":
      spent = {phase: value for phase, value in record["seconds"].items() if phase in PHASES and is_number(value)}
      in_steps = spent.pop("step", 0.0) + spent.pop("device", 0.0)
      trained.append((step, in_steps, spent.get("data", 0.0)))
      for category, value in (spent | {"step": in_steps}).items():
        seconds[category] += value
    elif event == "end":
      has_finished = record["reason"] == "finished"
    last_time = record["time"]
  return Goodput({name: max(value, 0.0) for name, value in seconds.items()}, starts)  # -1e-16 of what was lost
