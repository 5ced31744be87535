"""A bounded record of every expert's load over a run: `expert_loads.bin`, of which the report draws a heat map.

The file is a line of JSON, {"stride", "experts": {layer: number of experts}}, and records of one size: a step (int64,
little-endian), and a byte for each expert of each layer (`encode`). The first logged step of every `stride` steps has a
record. Beyond MAX_RECORDS the stride doubles, and records that are not the first of their steps go.
"""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from deepseek_jax.errors import DataError
from deepseek_jax.training.metrics import EXPERT_LOADS, AppendFile, Histograms

MAX_RECORDS = 256
# Codes of load / mean: 0 is an expert that no token chose, 128 the mean, and each code is a factor of 2^(1/20) = 1.035.
# 1 and 255 are all that lies beyond, a factor of 81.
DEAD, MEAN, CODES_PER_OCTAVE = 0, 128, 20


def encode(fractions: np.ndarray) -> np.ndarray:
  """uint8 [experts], the codes of the `fractions` [experts] of a layer's assignments."""
  with np.errstate(divide="ignore"):
    octaves = np.log2(fractions * len(fractions))
  codes = np.clip(np.round(MEAN + CODES_PER_OCTAVE * octaves), 1, 255)
  return np.where(fractions > 0, codes, DEAD).astype(np.uint8)


def decode(codes: np.ndarray) -> np.ndarray:
  """float64 of the shape of `codes`: load / mean of each, 0 for an expert that no token chose."""
  return np.where(codes == DEAD, 0.0, 2.0 ** ((codes.astype(np.float64) - MEAN) / CODES_PER_OCTAVE))


@dataclasses.dataclass(frozen=True)
class ExpertLoads:
  """What a file has recorded.

  Attributes:
    stride: every so many steps have a record.
    steps: int64 [records], increasing.
    codes: {layer: uint8 [records, experts]}, of `encode`.
  """

  stride: int
  steps: np.ndarray
  codes: dict[str, np.ndarray]

  def select(self, kept: np.ndarray, stride: int) -> "ExpertLoads":
    """The records `kept`, bool [records], with another stride."""
    return ExpertLoads(stride, self.steps[kept], {layer: codes[kept] for layer, codes in self.codes.items()})

  def to_bytes(self) -> bytes:
    """The content of a file."""
    experts = {layer: codes.shape[1] for layer, codes in self.codes.items()}
    rows = [self.steps.astype("<i8")[:, None].view(np.uint8), *self.codes.values()]
    return json.dumps({"stride": self.stride, "experts": experts}).encode() + b"\n" + np.hstack(rows).tobytes()


def read_expert_loads(folder: str | os.PathLike[str]) -> ExpertLoads | None:
  """The record in the `folder` of a run, without an incomplete last one; None where there is no file.

  Raises DataError for a file that cannot be read, or is no such record.
  """
  path = os.path.join(folder, EXPERT_LOADS)
  try:
    with open(path, "rb") as file:
      header, data = file.readline(), file.read()
    fields = json.loads(header)
    stride, experts = int(fields["stride"]), {str(k): int(n) for k, n in fields["experts"].items()}
    size = 8 + sum(experts.values())
    if stride < 1 or min(experts.values()) < 1:
      raise ValueError
    rows = np.frombuffer(data, np.uint8, len(data) // size * size).reshape(-1, size)
  except FileNotFoundError:
    return None
  except OSError as error:
    raise DataError(f"cannot read {path}: {error.strerror}; move it away: only the heat map is made of it") from None
  except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
    raise DataError(
      f"{path}: expected a record of expert loads, got {header[:60]!r}; move it away: only the heat map is made of it"
    ) from None
  ends = np.cumsum([8, *experts.values()])
  codes = {layer: rows[:, start:end] for layer, start, end in zip(experts, ends[:-1], ends[1:], strict=True)}
  return ExpertLoads(stride, rows[:, :8].copy().view("<i8")[:, 0].astype(np.int64), codes)


class ExpertLoadWriter:
  """A MetricsWriter of `folder`/expert_loads.bin: of histograms router/LAYER/load. A model without experts has no file.

  Records past `resume_step` are cut on opening. As the stride counts steps from 0, a run that resumes records what it
  would have without the stop. What cannot be written, as on a full disk, is a warning, once, and ends the record: the
  run can do without. A file that is damaged is renamed, with a warning.
  """

  def __init__(self, folder: str | os.PathLike[str], resume_step: int):
    self._folder, self._path = os.fspath(folder), os.path.join(folder, EXPERT_LOADS)
    self._file: AppendFile | None = None
    self._stride, self._records, self._last_step, self._has_failed = 1, 0, -1, False
    self._experts: dict[str, int] = {}
    try:
      loads = read_expert_loads(folder)
    except DataError as error:
      loads = None
      os.replace(self._path, f"{self._path}.damaged")
      logging.getLogger(__name__).warning("%s; it is %s.damaged now, and a new one begins", error, self._path)
    if loads:
      self._replace(loads.select(loads.steps <= resume_step, loads.stride))

  def write(self, step: int, values: Mapping[str, Any], histograms: Histograms) -> None:
    """Records the loads of `step` if it is the first of its stride."""
    if self._has_failed or (self._last_step >= 0 and step // self._stride == self._last_step // self._stride):
      return
    fractions = {name.split("/")[1]: np.asarray(bars) for name, bars in histograms.items() if _is_load(name)}
    if not fractions:
      return
    codes = {layer: encode(of_layer) for layer, of_layer in fractions.items()}
    record = ExpertLoads(self._stride, np.array([step]), {layer: c[None] for layer, c in codes.items()})
    try:
      if self._file is None or self._experts != {layer: len(c) for layer, c in codes.items()}:  # or another variant
        self._replace(record)
      else:
        self._file.append(record.to_bytes().partition(b"\n")[2])
        self._last_step, self._records = step, self._records + 1
      if self._records > MAX_RECORDS:
        self._thin()
    except OSError as error:
      self._has_failed = True
      text = "%s cannot be written: %s; the report's heat map of experts ends before step %d"
      logging.getLogger(__name__).warning(text, self._path, error.strerror, step)

  def event(self, name: str, step: int, **values: Any) -> None:
    """Writes nothing: events have no loads."""

  def close(self) -> None:
    """Closes the file."""
    if self._file:
      self._file.close()

  def _thin(self) -> None:
    loads = read_expert_loads(self._folder)
    while loads and len(loads.steps) > MAX_RECORDS:
      stride = 2 * loads.stride
      loads = loads.select(np.diff(loads.steps // stride, prepend=-1) > 0, stride)
    if loads:
      self._replace(loads)

  def _replace(self, loads: ExpertLoads) -> None:
    """Writes `loads` in place of the file. Raises OSError; the file is as it was then."""
    partial = f"{self._path}.partial"
    try:
      with open(partial, "wb") as file:
        file.write(loads.to_bytes())
      os.replace(partial, self._path)
    except OSError:
      with contextlib.suppress(OSError):
        os.remove(partial)
      raise
    self.close()
    self._file = AppendFile(self._path)
    self._stride, self._records = loads.stride, len(loads.steps)
    self._last_step = int(loads.steps[-1]) if self._records else -1
    self._experts = {layer: codes.shape[1] for layer, codes in loads.codes.items()}


def _is_load(name: str) -> bool:
  group, _, rest = name.partition("/")
  return group == "router" and rest.count("/") == 1 and rest.endswith("/load")
