"""Rows of a benchmark in a JSON file that is rewritten after each row: an interrupted run continues with the others."""

import contextlib
import json
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from deepseek_jax.errors import ConfigError, format_exception

UNFINISHED = 3  # exit code: rows remain, and the same command continues with them
MAX_TRIES = 2  # of a row that never ends, before it counts as failed


class Results:
  """The rows of a JSON file, in `rows`: {name: row}.

  A row has its "name" and what was measured. "failure" is the reason where that failed. "begun" counts the tries so far
  of a row without a measurement.
  """

  def __init__(self, path: str | os.PathLike | None, conditions: dict[str, Any], row_seconds: float = float("inf")):
    """Reads the file, if there is one.

    Args:
      path: None writes nothing.
      conditions: what the rows depend on, such as the chip. A file with other conditions is overwritten.
      row_seconds: a row that takes longer has failed and is not tried again. The process ends with UNFINISHED, since a
        GPU that hangs cannot be interrupted otherwise.

    Raises:
      ConfigError: the file is not JSON.
    """
    self.path, self.conditions, self._row_seconds = path and pathlib.Path(path), conditions, row_seconds
    self.rows: dict[str, dict[str, Any]] = {}
    content = read_json(path) if path else None
    if content and {name: content.get(name) for name in conditions} == conditions:
      self.rows = {row["name"]: row for row in content.get("rows", ())}

  def is_finished(self, name: str) -> bool:
    """Whether the row was measured, or was tried too often."""
    row = self.rows.get(name)
    return row is not None and ("begun" not in row or ("failure" in row and row["begun"] >= MAX_TRIES))

  def run(
    self,
    names: Iterable[str],
    measure: Callable[[str], dict[str, Any]],
    show: Callable[[dict[str, Any]], object],
    seconds: float = float("inf"),
  ) -> int:
    """Calls `measure(name)` for each row that is not finished, and `show(row)` for every row.

    Rows that failed or were interrupted before come last. After `seconds` no further row starts.

    Returns:
      The exit code: UNFINISHED if rows remain, 1 if a row failed, or 0.
    """
    start, rows_remain, failed = time.monotonic(), False, False
    for name in sorted(names, key=lambda name: self.rows.get(name, {}).get("begun", 0)):
      if not self.is_finished(name):
        if time.monotonic() - start > seconds:
          rows_remain = True
          show({"name": name, "failure": f"not run: {seconds:.0f} s are over"})
          continue
        self._measure(name, measure)
      failed |= "failure" in self.rows[name]
      show(self.rows[name])
    return UNFINISHED if rows_remain else int(failed)

  def _measure(self, name: str, measure: Callable[[str], dict[str, Any]]) -> None:
    tries = self.rows.get(name, {}).get("begun", 0) + 1
    unfinished = {"name": name, "begun": tries}
    if tries >= MAX_TRIES:
      unfinished["failure"] = f"interrupted {tries} times; remove the row from {self.path} to try again"
    self._write_row(unfinished)
    watchdog = threading.Timer(min(self._row_seconds, threading.TIMEOUT_MAX), self._abort, [name])
    watchdog.daemon = True
    watchdog.start()
    try:
      row = {"name": name, **measure(name)}
    except Exception as e:  # the other rows are still worth measuring
      row = {"name": name, "failure": f"failed: {format_exception(e)}", "begun": 1}
    watchdog.cancel()
    self._write_row(row)

  def _abort(self, name: str) -> None:
    self._write_row({"name": name, "failure": f"failed: took more than {self._row_seconds:.0f} s", "begun": MAX_TRIES})
    print(f"{name}: took more than {self._row_seconds:.0f} s; this process ends", flush=True)
    os._exit(UNFINISHED)

  def _write_row(self, row: dict[str, Any]) -> None:
    self.rows[row["name"]] = row
    if self.path:
      write_json(self.path, {**self.conditions, "rows": list(self.rows.values())})


def read_json(path: str | os.PathLike) -> Any:
  """The content of a JSON file, or None if there is no file.

  Raises:
    ConfigError: the file is not JSON.
  """
  with contextlib.suppress(FileNotFoundError):
    try:
      return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
      raise ConfigError(f"{path} is not JSON ({error}): remove it or name another file") from None
  return None


def write_json(path: str | os.PathLike, content: Any, **json_options: Any) -> None:
  """Writes a JSON file atomically: an interrupted write leaves the file before."""
  path = pathlib.Path(path)
  partial = path.with_name(path.name + ".part")
  partial.write_text(json.dumps(content, indent=1, **json_options) + "\n", encoding="utf-8")
  os.replace(partial, path)
