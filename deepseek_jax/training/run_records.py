"""What a run has written, to draw and compare: its config, its metrics as columns, its events."""

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from deepseek_jax.errors import DataError
from deepseek_jax.training import metrics

CONFIG = "config.json"
BLOCK = 128  # lines that are parsed before their numbers are put into arrays
LARGEST = 1e300  # what a chart can show is below
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

  def stretches(self, count: int, least: int) -> list["Column"]:
    """At most `count` parts of what is finite, of equal numbers of values, at least `least` each; [] where it is less."""
    finite = np.flatnonzero(~np.isnan(self.values))
    count = min(count, len(finite) // least)
    return [Column(self.steps[part], self.values[part]) for part in np.array_split(finite, count)] if count else []


@dataclasses.dataclass(frozen=True)
class RunRecords:
  """The records of a run.

  Attributes:
    config: config.json, nested dicts.
    steps: int64 [rows], the logged steps.
    columns: each metric by its name.
    events: of events.jsonl, in order.
  """

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
  return RunRecords(config, steps, columns, metrics.read_jsonl(os.path.join(folder, metrics.EVENTS)))


def read_columns(path: str | os.PathLike[str]) -> tuple[np.ndarray, dict[str, Column]]:
  """(logged steps int64 [rows], each metric of metrics.jsonl by its name), without an incomplete last line.

  Raises DataError as `metrics.read_jsonl`.
  """
  # Rows with the same metrics, which most rows of a run are, are one table: of numbers [metrics, rows], in blocks.
  tables: dict[tuple[str, ...], tuple[list[int], list[np.ndarray]]] = {}
  lines, rows = (line for _, line in metrics.iterate_jsonl(path)), 0
  while block := list(itertools.islice(lines, BLOCK)):
    by_names: dict[tuple[str, ...], list[int]] = {}
    for i, names in enumerate(map(tuple, block)):
      by_names.setdefault(names, []).append(i)
    for names, indices in by_names.items():
      row_numbers, blocks = tables.setdefault(names, ([], []))
      row_numbers += [rows + i for i in indices]
      blocks.append(_to_numbers([block[i] for i in indices], len(names)))
    rows += len(block)
  steps = np.zeros(rows, np.int64)
  parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
  for names in list(tables):
    row_numbers, blocks = tables.pop(names)
    at, numbers = np.asarray(row_numbers), np.concatenate(blocks, axis=1)
    blocks.clear()
    steps[at] = numbers[names.index("step")]
    for name, values in zip(names, numbers, strict=True):
      parts.setdefault(name, []).append((at, values))
  parts.pop("step", None)
  return steps, {name: _column(steps, of_tables) for name, of_tables in parts.items()}


def _to_numbers(lines: list[dict[str, Any]], names: int) -> np.ndarray:
  """float64 [names, lines], the values of `lines`, which have the same names in the same order; NaN for no number."""
  values = itertools.chain.from_iterable(map(dict.values, lines))
  try:
    numbers = np.fromiter(values, np.float64, len(lines) * names)
  except (TypeError, ValueError, OverflowError):  # a null, or a text
    values = itertools.chain.from_iterable(map(dict.values, lines))
    numbers = np.array([value if is_number(value) else np.nan for value in values], np.float64)
  numbers[np.abs(numbers) >= LARGEST] = np.nan
  return numbers.reshape(len(lines), names).T


def _column(steps: np.ndarray, of_tables: list[tuple[np.ndarray, np.ndarray]]) -> Column:
  """The column of (rows, values) pairs, whose rows are of `steps`."""
  if len(of_tables) == 1:
    rows, values = of_tables[0]
    return Column(steps if len(rows) == len(steps) else steps[rows], values)
  rows, values = (np.concatenate(arrays) for arrays in zip(*of_tables, strict=True))
  order = np.argsort(rows)
  return Column(steps[rows[order]], values[order])


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
  return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST
