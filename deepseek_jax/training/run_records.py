"""What a run has written, to draw and compare: its config, its metrics as columns, its events."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from deepseek_jax.errors import DataError
from deepseek_jax.training import metrics

CONFIG = "config.json"
Event = dict[str, Any]  # an object of events.jsonl


@dataclasses.dataclass(frozen=True)
class Column:
  """A metric over the logged steps at which it was measured.

  Attributes:
    steps: int64 [n], increasing: completed updates.
    values: float64 [n]; NaN where the value was not finite.
  """

  steps: np.ndarray
  values: np.ndarray

  def __len__(self) -> int:
    return len(self.steps)


@dataclasses.dataclass(frozen=True)
class RunRecords:
  """The records of a run.

  Attributes:
    folder: where they are.
    config: config.json, nested dicts.
    steps: int64 [rows], the logged steps.
    columns: each metric by its name.
    events: of events.jsonl, in order.
  """

  folder: str
  config: dict[str, Any]
  steps: np.ndarray
  columns: Mapping[str, Column]
  events: list[Event]

  def events_by_step(self, name: str) -> list[Event]:
    """Events called `name` by increasing step; of two at the same step (before and after a resume) the later one."""
    by_step = {e["step"]: e for e in self.events if e["event"] == name}
    return [by_step[step] for step in sorted(by_step)]


def read_run(folder: str | os.PathLike[str]) -> RunRecords:
  """The records in the local `folder` of a run that may be going on, or was killed.

  Raises DataError for a folder without the config of a run, and for a file that cannot be read or is damaged.
  """
  folder = os.fspath(folder)
  config = read_config(os.path.join(folder, CONFIG))
  steps, columns = read_columns(os.path.join(folder, metrics.METRICS))
  return RunRecords(folder, config, steps, columns, metrics.read_jsonl(os.path.join(folder, metrics.EVENTS)))


def read_columns(path: str | os.PathLike[str]) -> tuple[np.ndarray, dict[str, Column]]:
  """(logged steps int64 [rows], each metric of metrics.jsonl by its name), without an incomplete last line.

  Raises DataError as `metrics.read_jsonl`.
  """
  steps: list[int] = []
  rows: dict[str, tuple[list[int], list[float]]] = {}
  for line in metrics.read_jsonl(path):
    step = line.pop("step")
    steps.append(step)
    for name, value in line.items():
      at, values = rows.setdefault(name, ([], []))
      at.append(step)
      values.append(value if is_number(value) else np.nan)
  columns = {name: Column(np.asarray(at, np.int64), np.asarray(v, np.float64)) for name, (at, v) in rows.items()}
  return np.asarray(steps, np.int64), columns


def read_config(path: str) -> dict[str, Any]:
  """The config that a run has written. Raises DataError where there is none, or another kind of file."""
  try:
    with open(path, encoding="utf-8") as file:
      tree = json.load(file)
  except OSError as error:
    raise DataError(f"{path}: expected the config of a run, got {error.strerror}; name the folder of a run") from None
  except ValueError as error:
    raise DataError(f"{path}: expected JSON, got {error}; run the training command again to write it") from None
  if not isinstance(tree, dict):
    raise DataError(f"{path}: expected a JSON object, got {type(tree).__name__}; run the training command again")
  if "model_type" in tree:
    raise DataError(
      f"{path}: expected the config of a run, got that of a Hugging Face folder; name the folder of a run"
    )
  return tree


def is_number(value: Any) -> bool:
  """Whether a value of JSON is a number that a chart can show."""
  return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
