"""The metrics of a run: writers, among them that of `metrics.jsonl` and `events.jsonl`, and reading these files.

Both files hold one JSON object per line. A float that is not finite is written as null, because JSON has no NaN: a key
that is absent was not measured, a key that is null was measured and was not finite.
"""

import contextlib
import json
import logging
import math
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Protocol

import numpy as np
import orjson

from deepseek_jax.errors import DataError, WriteError

METRICS, EVENTS, EXPERT_LOADS, SELFTEST = "metrics.jsonl", "events.jsonl", "expert_loads.bin", "selftest.json"
GOODPUT = "goodput.jsonl"
RESUME_FILES = METRICS, EVENTS, EXPERT_LOADS, SELFTEST, GOODPUT  # what a resume reads or appends to

# These stay when a run is restored to an earlier step. Other events past that step are measured again.
PROCESS_EVENTS = ("start", "resume", "corruption", "end")


Histograms = Mapping[str, Sequence[float] | np.ndarray]  # name -> heights of bars 0, 1, ...


class MetricsWriter(Protocol):
  """Where the numbers of a run go. Process 0 of a run has a list of them, and closes them at its end.

  Lines and events are written in order, in a thread beside the loop. What a method raises ends the run.
  """

  def write(self, step: int, values: Mapping[str, Any], histograms: Histograms) -> None:
    """Writes what was logged of an update.

    Args:
      step: completed updates.
      values: {name: Python, NumPy or JAX scalar}; a float may be inf or NaN.
      histograms: of each MoE layer, the share of the assignments that each expert got.
    """

  def event(self, name: str, step: int, **values: Any) -> None:
    """Writes what happened after `step` updates: an evaluation, a sample, or one of PROCESS_EVENTS.

    values: scalars, texts, and lists and dicts of these.
    """

  def close(self) -> None:
    """Ends the writer; nothing is written to it any more."""


class JsonlWriter:
  """Appends to the metrics and events of `folder`, a line at a time and at once. Only one process may write.

  Lines past `resume_step` and an incomplete last line are cut on opening, so that no step is counted twice.

  Args:
    folder: a local folder.
    resume_step: completed updates that the run starts from; 0: a fresh start.

  Raises:
    DataError: a file that is not JSONL.
    WriteError: a line that cannot be written, as on a full disk; nothing of it stays.
  """

  def __init__(self, folder: str | os.PathLike[str], resume_step: int):
    os.makedirs(folder, exist_ok=True)
    metrics, events = os.path.join(folder, METRICS), os.path.join(folder, EVENTS)
    keep_lines(metrics, lambda line: line["step"] <= resume_step)
    keep_lines(events, lambda line: line["event"] in PROCESS_EVENTS or line["step"] <= resume_step)
    self._metrics, self._events = AppendFile(metrics), AppendFile(events)

  def write(self, step: int, values: Mapping[str, Any], histograms: Histograms) -> None:
    """Writes one line of metrics, without the histograms: they would be most of the file."""
    self._append(self._metrics, {"step": step, **to_json(values)})

  def event(self, name: str, step: int, **values: Any) -> None:
    """Writes one event with the time in Unix seconds."""
    self._append(self._events, {"event": name, "step": step, "time": time.time(), **to_json(values)})

  def close(self) -> None:
    """Closes both files."""
    self._metrics.close()
    self._events.close()

  def _append(self, file: "AppendFile", line: dict[str, Any]) -> None:
    try:
      file.append(json.dumps(line, allow_nan=False).encode() + b"\n")
    except OSError as error:
      raise WriteError(f"{file.path} cannot be written: {error.strerror}") from None


class TensorboardWriter:
  """Writes to `folder`/tensorboard what is finite, and hides what an earlier process wrote past `resume_step`.

  An event has all that is written at once. What cannot be written, as on a full disk, is a warning, once: metrics.jsonl
  has the same numbers.
  """

  def __init__(self, folder: str | os.PathLike[str], resume_step: int):
    from tensorboardX.proto import event_pb2  # imported here: it takes 0.2 s, which a run without TensorBoard saves

    folder = os.path.join(folder, "tensorboard")
    os.makedirs(folder, exist_ok=True)
    # Without the suffix a restart in the same second would append to the file before it.
    name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.from_step_{resume_step}"
    self._file, self._make_event, self._has_warned = AppendFile(os.path.join(folder, name)), event_pb2.Event, False
    self._append(0, file_version="brain.Event:2")
    # TensorBoard hides the steps of earlier event files from this one on.
    self._append(resume_step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

  def write(self, step: int, values: Mapping[str, Any], histograms: Histograms) -> None:
    """Writes scalars, and histograms with a bar for each expert."""
    from tensorboardX import summary

    bars = [
      summary.histogram_raw(
        name, min=0, max=len(heights), num=sum(heights), sum=sum(i * h for i, h in enumerate(heights)),
        sum_squares=sum(i**2 * h for i, h in enumerate(heights)),
        bucket_limits=range(1, len(heights) + 1), bucket_counts=heights,
      )
      for name, heights in histograms.items()
    ]  # fmt: skip
    self._add(step, values, summaries=bars)

  def event(self, name: str, step: int, **values: Any) -> None:
    """Writes evaluations and samples; starts and ends are no curves."""
    if name not in PROCESS_EVENTS:
      self._add(step, values, name + "/")

  def close(self) -> None:
    """Closes the event file."""
    self._file.close()

  def _add(self, step: int, values: Mapping[str, Any], prefix: str = "", summaries: Sequence[Any] = ()) -> None:
    from tensorboardX import summary

    protos = [value for one in summaries for value in one.value]
    for name, value in to_json(values).items():
      if isinstance(value, str):
        protos += summary.text(prefix + name, value).value
      elif isinstance(value, (int, float)):  # not by summary.scalar, which takes three times as long
        protos.append(summary.Summary.Value(tag=prefix + name, simple_value=value))
    self._append(step, summary=summary.Summary(value=protos))

  def _append(self, step: int, **content: Any) -> None:
    """Appends an event as a TFRecord: its length, its checksum, the event, its checksum."""
    from tensorboardX.record_writer import masked_crc32c

    event = self._make_event(wall_time=time.time(), step=step, **content).SerializeToString()
    length = struct.pack("<Q", len(event))
    length_crc, event_crc = (struct.pack("<I", masked_crc32c(part)) for part in (length, event))
    try:
      self._file.append(length + length_crc + event + event_crc)
    except OSError as error:
      if not self._has_warned:
        self._has_warned = True
        text = "%s cannot be written: %s; TensorBoard lacks what is logged from step %d on, metrics.jsonl has it"
        logging.getLogger(__name__).warning(text, self._file.path, error.strerror, step)


class AppendFile:
  """A file of records, each of which is written at once and as a whole, or not at all: of one that fails nothing stays."""

  def __init__(self, path: str):
    self.path = path
    self._file = open(path, "ab", buffering=0)

  def append(self, record: bytes) -> None:
    """Appends `record`. Raises OSError where there is no room for all of it."""
    end, rest = os.fstat(self._file.fileno()).st_size, memoryview(record)
    try:
      while rest:
        rest = rest[self._file.write(rest) :]
    except OSError:
      with contextlib.suppress(OSError):
        self._file.truncate(end)
      raise

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def end_unopened(folder: str, reason: str) -> None:
  """Writes the event of an end to the files in `folder` of a run that has not opened its writers.

  It is of the step of the last event. Nothing is written after an end.
  """
  events = read_jsonl(os.path.join(folder, EVENTS))
  if [e["event"] for e in events if e["event"] in PROCESS_EVENTS][-1:] == ["end"]:
    return
  step = events[-1]["step"] if events else 0
  with contextlib.closing(JsonlWriter(folder, sys.maxsize)) as writer:
    writer.event("end", step, reason=reason)


# (local folder of the run, completed updates that it starts from) -> writer
WriterFactory = Callable[[str, int], MetricsWriter]


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The objects of metrics.jsonl, events.jsonl or goodput.jsonl, in order, without an incomplete last line. [] where there is no file.

  Raises DataError for a file that cannot be read, and, with the line's number, for any other line that is not an object
  with an integer `step`.
  """
  return [line for _, line in iterate_jsonl(path)]


def iterate_jsonl(path: str | os.PathLike[str]) -> Iterator[tuple[bytes, dict[str, Any]]]:
  """Yields (bytes, object) of each line of `read_jsonl`, one at a time: a long run's file need not fit in memory."""
  if not os.path.exists(path):
    return
  is_events = os.path.basename(path) == EVENTS
  with _open_to_read(path) as file:
    for number, raw in enumerate(file, 1):
      if not raw.endswith(b"\n"):
        return
      line = _parse(raw)
      is_record = type(line) is dict and type(line.get("step")) is int
      if not is_record or (is_events and not isinstance(line.get("event"), str)):
        raise DataError(
          f"{path}, line {number}: expected a JSON object with an integer step, got {raw[:60]!r}; "
          "remove that line, or move the file away to start a new one"
        )
      yield raw, line


def _parse(raw: bytes) -> Any:
  """What `raw` is in JSON; None where it is not JSON."""
  try:
    return orjson.loads(raw)
  except ValueError:
    try:
      return json.loads(raw)  # takes what orjson refuses: a sample may have half of a surrogate pair
    except ValueError:
      return None


def _open_to_read(path: str | os.PathLike[str]) -> BinaryIO:
  try:
    return open(path, "rb")
  except OSError as error:
    raise DataError(f"cannot read {path}: {error.strerror}; move it away, or use another --workdir") from None


def keep_lines(path: str, keep: Callable[[dict[str, Any]], bool]) -> None:
  """Rewrites `path` atomically with the complete lines for which `keep` is true. Untouched if those are all."""
  if not os.path.exists(path):
    return
  partial = path + ".partial"
  try:
    with open(partial, "wb") as file:
      for raw, line in iterate_jsonl(path):
        if keep(line):
          file.write(raw)
  except OSError:
    with contextlib.suppress(OSError):
      os.remove(partial)
    raise
  if os.path.getsize(partial) == os.path.getsize(path):
    os.remove(partial)
  else:
    os.replace(partial, path)


def to_json(value: Any) -> Any:
  """`value` for JSON: NumPy and JAX scalars as Python's, floats that are not finite as None."""
  if isinstance(value, Mapping):
    return {name: to_json(item) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [to_json(item) for item in value]
  if hasattr(value, "item"):
    value = value.item()
  return None if isinstance(value, float) and not math.isfinite(value) else value
