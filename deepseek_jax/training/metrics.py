"""The metrics of a run on disk: `metrics.jsonl`, `events.jsonl`, and a copy for TensorBoard.

Both files hold one JSON object per line. A float that is not finite is written as null, because JSON has no NaN: a key
that is absent was not measured, a key that is null was measured and was not finite.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from deepseek_jax.errors import DataError

METRICS, EVENTS, SELFTEST = "metrics.jsonl", "events.jsonl", "selftest.json"
RESUME_FILES = METRICS, EVENTS, SELFTEST  # what a resume reads or appends to

# These stay when a run is restored to an earlier step. Other events past that step are measured again.
PROCESS_EVENTS = ("start", "resume", "end")


class MetricsWriter:
  """Appends to the metrics and events of `workdir`, and flushes each line. Only one process may write.

  Lines past `resume_step` and an incomplete last line are cut on opening, so that no step is counted twice.

  Args:
    workdir: a local folder.
    tensorboard: whether to write to TensorBoard as well.
    resume_step: completed updates that the run starts from; 0: a fresh start.

  Raises:
    DataError: a file that is not JSONL.
  """

  def __init__(self, workdir: str | os.PathLike[str], tensorboard: bool, resume_step: int):
    os.makedirs(workdir, exist_ok=True)
    metrics, events = os.path.join(workdir, METRICS), os.path.join(workdir, EVENTS)
    _keep_lines(metrics, lambda line: line["step"] <= resume_step)
    _keep_lines(events, lambda line: line["event"] in PROCESS_EVENTS or line["step"] <= resume_step)
    self._metrics, self._events = open(metrics, "ab"), open(events, "ab")
    self._tensorboard = _summary_writer(os.path.join(workdir, "tensorboard"), resume_step) if tensorboard else None

  def write(
    self, step: int, values: Mapping[str, Any], histograms: Mapping[str, Sequence[float] | np.ndarray] | None = None
  ) -> None:
    """Writes one line of metrics.

    Args:
      step: completed updates.
      values: {name: Python, NumPy or JAX scalar}.
      histograms: {name: heights of bars 0, 1, ...}, written to TensorBoard only: they would be most of the file.
    """
    values = _to_json(values)
    _append(self._metrics, {"step": step, **values})
    if self._tensorboard:
      for name, heights in (histograms or {}).items():
        self._tensorboard.add_histogram_raw(
          name, min=0, max=len(heights), num=sum(heights), sum=sum(i * h for i, h in enumerate(heights)),
          sum_squares=sum(i**2 * h for i, h in enumerate(heights)),
          bucket_limits=range(1, len(heights) + 1), bucket_counts=heights, global_step=step,
        )  # fmt: skip
    self._write_tensorboard(step, values)

  def event(self, name: str, step: int, **values: Any) -> None:
    """Writes one event with the time in Unix seconds. Evaluations and samples go to TensorBoard as well."""
    values = _to_json(values)
    _append(self._events, {"event": name, "step": step, "time": time.time(), **values})
    if name not in PROCESS_EVENTS:
      self._write_tensorboard(step, values, name + "/")

  def close(self) -> None:
    """Closes all files."""
    self._metrics.close()
    self._events.close()
    if self._tensorboard:
      self._tensorboard.close()

  def _write_tensorboard(self, step: int, values: Mapping[str, Any], prefix: str = "") -> None:
    if not self._tensorboard:
      return
    for name, value in values.items():
      if isinstance(value, str):
        self._tensorboard.add_text(prefix + name, value, step)
      elif isinstance(value, (int, float)):
        self._tensorboard.add_scalar(prefix + name, value, step)
    self._tensorboard.flush()


class NullWriter(MetricsWriter):
  """A MetricsWriter that writes nothing, for all processes but process 0."""

  def __init__(self) -> None:
    pass

  def write(
    self, step: int, values: Mapping[str, Any], histograms: Mapping[str, Sequence[float] | np.ndarray] | None = None
  ) -> None:
    pass

  def event(self, name: str, step: int, **values: Any) -> None:
    pass

  def close(self) -> None:
    pass


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The objects of metrics.jsonl or events.jsonl, in order, without an incomplete last line. [] where there is no file.

  Raises DataError, with the line's number, for any other line that is not an object with an integer `step`.
  """
  return [line for _, line in _lines(path)]


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[bytes, dict[str, Any]]]:
  """Yields (bytes, object) of each complete line, one at a time: a long run's file need not fit in memory twice."""
  if not os.path.exists(path):
    return
  with open(path, "rb") as file:
    for number, raw in enumerate(file, 1):
      if not raw.endswith(b"\n"):
        return
      try:
        line = json.loads(raw)
        valid = isinstance(line, dict) and type(line.get("step")) is int
      except ValueError:
        valid = False
      if not valid or (os.path.basename(path) == EVENTS and not isinstance(line.get("event"), str)):
        raise DataError(
          f"{path}, line {number}: expected a JSON object with an integer step, got {raw[:60]!r}; "
          "remove that line, or move the file away to start a new one"
        )
      yield raw, line


def _keep_lines(path: str, keep: Callable[[dict[str, Any]], bool]) -> None:
  """Rewrites `path` atomically with the complete lines for which `keep` is true. Untouched if those are all."""
  if not os.path.exists(path):
    return
  partial = path + ".partial"
  with open(partial, "wb") as file:
    for raw, line in _lines(path):
      if keep(line):
        file.write(raw)
  if os.path.getsize(partial) == os.path.getsize(path):
    os.remove(partial)
  else:
    os.replace(partial, path)


def _append(file: BinaryIO, line: dict[str, Any]) -> None:
  file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
  file.flush()


def _to_json(value: Any) -> Any:
  """`value` for JSON: NumPy and JAX scalars as Python's, floats that are not finite as None."""
  if isinstance(value, dict):
    return {name: _to_json(item) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_to_json(item) for item in value]
  if hasattr(value, "item"):
    value = value.item()
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _summary_writer(folder: str, resume_step: int) -> Any:
  from tensorboardX import SummaryWriter  # imported here: it takes 0.2 s, which a run without TensorBoard saves

  # TensorBoard hides the steps of earlier event files from purge_step on. Names of event files have the time in
  # seconds, so that without the suffix a quick restart would overwrite the file before it.
  return SummaryWriter(folder, purge_step=resume_step + 1, filename_suffix=f".from_step_{resume_step}")
