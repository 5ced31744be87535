"""Tables of runs: CSV files, ours or other people's, checked at the door."""

import csv
import dataclasses
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from deepseek_jax.errors import DataError

# Columns of a table that `scaling table` writes. Fits read those that they need.
COLUMNS = (
  "run_id", "status", "budget", "flops", "M", "params", "params_active", "params_nonembedding", "tokens", "unique_tokens",
  "n_layer", "d_model", "seq_len", "experts", "granularity", "batch_tokens", "lr", "seed", "val_loss", "val_bpb", "seconds",
)  # fmt: skip
TEXT_COLUMNS = {"run_id", "status"}
ANY_SIGN = {"seed", "experts", "granularity", "seconds"}  # numbers that may be 0
LOSSES = ("loss", "val_bpb", "val_loss")  # the first that a table has is fitted
SCALES = {"M": "M", "N": "params", "N_nonemb": "params_nonembedding"}  # --scale: column


@dataclasses.dataclass(frozen=True)
class RunTable:
  """The rows of a table that count. A column is checked when it is read: others may hold anything.

  Attributes:
    cells: a dict for each row: {their name of a column: text}.
    names: {our name of a column: theirs}.
    rows: numbers of the rows in the file, the first below the header being 2, as editors show them.
    path: for errors.
    mapped: our names that --columns gives, which come before others of the kind.
  """

  cells: Sequence[Mapping[str, str]]
  names: Mapping[str, str]
  rows: Sequence[int]
  path: str
  mapped: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.cells)

  def __contains__(self, name: str) -> bool:
    return name in self.names and any(row[self.names[name]] for row in self.cells)

  def __getitem__(self, name: str) -> np.ndarray:
    """A column: [rows] float64, or str for those of TEXT_COLUMNS.

    Raises DataError where the table has none, or where a cell is no positive finite number.
    """
    if name not in self:
      have = ", ".join(self.cells[0])
      raise DataError(f"{self.path}: no column {name!r}; it has {have}. Name yours: --columns={name}=YOUR_NAME")
    theirs = self.names[name]
    values = [_value(self.path, n, name, theirs, row[theirs]) for n, row in zip(self.rows, self.cells, strict=True)]
    return np.array(values)

  def optional(self, name: str) -> np.ndarray | None:
    """A column, or None where the table lacks it or a cell of it cannot be used."""
    try:
      return self[name]
    except DataError:
      return None

  def take(self, index: Sequence[int] | np.ndarray) -> "RunTable":
    """The rows at `index`."""
    return dataclasses.replace(self, cells=[self.cells[i] for i in index], rows=[self.rows[i] for i in index])

  def loss_name(self) -> str:
    """The column that is fitted: the first of LOSSES that the table has, one that --columns gives before others."""
    ordered = sorted(LOSSES, key=lambda name: name not in self.mapped)
    found = next((name for name in ordered if name in self), None)
    if not found:
      raise DataError(
        f"{self.path}: no column of losses ({', '.join(LOSSES)}); it has {', '.join(self.cells[0])}. Name yours: "
        "--columns=loss=YOUR_NAME"
      )
    return found

  def default_scale(self) -> str:
    """The first key of SCALES whose column the table has, one that --columns gives before others; M where it has none."""
    ordered = sorted(SCALES, key=lambda name: SCALES[name] not in self.mapped)
    return next((name for name in ordered if SCALES[name] in self), "M")

  def scale(self, name: str) -> np.ndarray:
    """The model scale `name` of SCALES. N of a mixture of experts is its active parameters, where the table has them."""
    if name == "N" and (active := self.optional("params_active")) is not None:
      return active
    return self[SCALES[name]]

  def tokens(self) -> np.ndarray:
    """Tokens of each run: the column, or what FLOPs and scale leave (C = M D, or C = 6 N D)."""
    if "tokens" in self:
      return self["tokens"]
    scale = self.default_scale()
    return self["flops"] / (flops_per_scale(scale) * self.scale(scale))

  def flops(self) -> np.ndarray:
    """FLOPs of each run: the column, or M D, or 6 N D."""
    if "flops" in self:
      return self["flops"]
    scale = self.default_scale()
    return flops_per_scale(scale) * self.scale(scale) * self["tokens"]


def flops_per_scale(scale: str) -> float:
  """C over scale times tokens: 1 for M, 6 for parameters."""
  return 1.0 if scale == "M" else 6.0


def parse_columns(text: str) -> dict[str, str]:
  """{our name: theirs} of --columns="flops=C,loss=final_loss". Raises DataError."""
  mapping: dict[str, str] = {}
  for part in filter(None, (p.strip() for p in text.split(","))):
    ours, equals, theirs = (piece.strip() for piece in part.partition("="))
    if not equals or not theirs or ours not in (*COLUMNS, "loss"):
      raise DataError(
        f"--columns={text}: expected OURS=THEIRS with commas between, and ours one of {', '.join((*COLUMNS, 'loss'))}; "
        f"got {part!r}"
      )
    mapping[ours] = theirs
  return mapping


def parse_where(text: str) -> dict[str, str]:
  """{their column: value} of --where="warmup=short,decay=const". Raises DataError."""
  conditions: dict[str, str] = {}
  for part in filter(None, (p.strip() for p in text.split(","))):
    column, equals, value = (piece.strip() for piece in part.partition("="))
    if not equals:
      raise DataError(f"--where={text}: expected COLUMN=VALUE with commas between, got {part!r}")
    conditions[column] = value
  return conditions


def read_table(path: str | os.PathLike[str], columns: str = "", where: str = "", min_rows: int = 3) -> RunTable:
  """Reads a CSV with a header. Rows whose `status` is not "finished" are left out.

  Args:
    columns, where: as the flags.
    min_rows: the least number of rows that a fit needs.

  Raises:
    DataError: the file cannot be read, lacks a column, has a value that is no positive finite number, a run twice, or too
      few rows. The message names row and column.
  """
  name, mapping, conditions = os.fspath(path), parse_columns(columns), parse_where(where)
  header, rows = _read_csv(name)
  for ours, theirs in mapping.items():
    if theirs not in header:
      raise DataError(f"{name}: --columns={ours}={theirs}, and it has no column {theirs!r}; it has {', '.join(header)}")
  for column in conditions:
    if column not in header:
      raise DataError(f"{name}: --where={column}=..., and it has no column {column!r}; it has {', '.join(header)}")
  sources = {ours: ours for ours in (*COLUMNS, "loss") if ours in header} | mapping
  kept = [(number, row) for number, row in rows if all(row[c] == v for c, v in conditions.items())]
  if "status" in sources:
    statuses = sorted({row[sources["status"]] for _, row in kept})
    if kept and "finished" not in statuses:
      raise DataError(
        f"{name}: rows count whose status is finished, and there is none; the column {sources['status']!r} has "
        f"{', '.join(map(repr, statuses[:5]))}. Rename the column if it means something else"
      )
    kept = [(number, row) for number, row in kept if row[sources["status"]] == "finished"]
  if len(kept) < min_rows:
    filtered = f" of {len(rows)} after --where and status" if len(kept) < len(rows) else ""
    raise DataError(f"{name}: {len(kept)} rows{filtered}, and {min_rows} are needed at least: add runs")
  table = RunTable([row for _, row in kept], sources, [number for number, _ in kept], name, tuple(mapping))
  _check_duplicates(table)
  return table


def _read_csv(path: str) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
  """(header, [(row number, {column: text})]). Raises DataError."""
  try:
    with open(path, encoding="utf-8-sig", newline="") as file:
      lines = list(csv.reader(file))
  except OSError as error:
    raise DataError(f"--table={path} cannot be read: {error.strerror}") from None
  except (UnicodeDecodeError, csv.Error) as error:
    raise DataError(f"--table={path} is no CSV in UTF-8: {error}") from None
  numbered = [(number, cells) for number, cells in enumerate(lines, 1) if any(cell.strip() for cell in cells)]
  if not numbered:
    raise DataError(f"{path} is empty: expected a header and a row for each run")
  header = [cell.strip() for cell in numbered[0][1]]
  twice = next((cell for cell in header if header.count(cell) > 1), None)
  if twice is not None:
    raise DataError(f"{path}: the header has {twice!r} twice: rename one")
  rows = []
  for number, cells in numbered[1:]:
    if len(cells) != len(header):
      raise DataError(f"{path}, row {number}: {len(cells)} cells, and the header has {len(header)}")
    rows.append((number, dict(zip(header, (cell.strip() for cell in cells), strict=True))))
  return header, rows


def _value(path: str, number: int, ours: str, theirs: str, text: str) -> Any:
  """A cell as str or float. Raises DataError for what is no number, and for what is not positive and finite."""
  if ours in TEXT_COLUMNS:
    return text
  try:
    value = float(text)
  except ValueError:
    raise DataError(f"{path}, row {number}, column {theirs!r}: expected a number, got {text!r}") from None
  if not math.isfinite(value) or value < 0 or (value == 0 and ours not in ANY_SIGN):
    raise DataError(f"{path}, row {number}, column {theirs!r}: expected a positive finite number, got {text}")
  return value


def _check_duplicates(table: RunTable) -> None:
  """Raises DataError where a run_id, or without run_ids all numbers that we know of a run, are there twice."""
  theirs = table.names.get("run_id")
  by_id = theirs is not None and all(cells[theirs] for cells in table.cells)
  seen: dict[Any, int] = {}
  for number, cells in zip(table.rows, table.cells, strict=True):
    key: Any = (
      cells[theirs]
      if by_id and theirs
      else tuple(_number(cells[name]) for name in table.names.values() if name != theirs)
    )
    if key in seen:
      what = f"run_id {key!r}" if by_id else "run"
      raise DataError(f"{table.path}, row {number}: the same {what} as in row {seen[key]}: remove one")
    seen[key] = number


def _number(text: str) -> float | str:
  try:
    return float(text)
  except ValueError:
    return text


def format_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
  """`rows` as CSV text; a missing value is an empty cell. Floats keep all their digits."""
  text = io.StringIO()
  writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()
