"""Rows of a benchmark in a JSON file that is rewritten after each: a run that is cut off goes on with what is missing."""

import contextlib
import json
import os
import pathlib
import threading
import time

from deepseek_jax.errors import ConfigError

UNFINISHED = 3  # exit code: rows are left, and the same command goes on with them
TRIES = 2  # of a row that never comes to an end, before it counts as failed


class Results:
  """`rows`: {name: {"name", what was measured, "failure": why it was not, "begun": how often}} of the file at `path`.

  path: None: nothing is written. head: what rows depend on, such as the chip; a file with another head begins anew.
  row_seconds: a row that takes longer has failed. Its process ends at once, with UNFINISHED, since a GPU that hangs is left
  no other way; a row that failed so is not tried again.
  """

  def __init__(self, path, head, row_seconds=float("inf")):
    self.path, self.head, self.rows, self._row_seconds = path and pathlib.Path(path), head, {}, row_seconds
    content = read_json(path) if path else None
    if content and {name: content.get(name) for name in head} == head:
      self.rows = {row["name"]: row for row in content.get("rows", ())}

  def finished(self, name):
    """Whether there is no more to do for the row: it was measured, or hangs."""
    row = self.rows.get(name)
    return row is not None and ("begun" not in row or ("failure" in row and row["begun"] >= TRIES))

  def run(self, names, measure, show, seconds=float("inf")):
    """Calls `measure(name)`, which gives a dict, for rows that are not finished, and `show(row)` for every row.

    Rows that failed or were cut off before come last. After `seconds` no row is started, and shown as not run.
    Returns the exit code: UNFINISHED, 1 if a row failed, or 0.
    """
    started, left, failed = time.monotonic(), False, False
    for name in sorted(names, key=lambda name: self.rows.get(name, {}).get("begun", 0)):
      if not self.finished(name):
        if time.monotonic() - started > seconds:
          left = True
          show({"name": name, "failure": f"not run: {seconds:.0f} s are over"})
          continue
        self._measure(name, measure)
      failed |= "failure" in self.rows[name]
      show(self.rows[name])
    return UNFINISHED if left else int(failed)

  def _measure(self, name, measure):
    begun = self.rows.get(name, {}).get("begun", 0) + 1
    unfinished = {"name": name, "begun": begun}
    if begun >= TRIES:
      unfinished["failure"] = f"cut off {begun} times; remove the row from {self.path} to try again"
    self._keep(unfinished)
    watchdog = threading.Timer(min(self._row_seconds, threading.TIMEOUT_MAX), self._give_up, [name])
    watchdog.daemon = True
    watchdog.start()
    try:
      row = {"name": name, **measure(name)}
    except Exception as e:  # the others are still worth their time on a GPU
      row = {"name": name, "failure": f"failed: {one_line(e)}", "begun": 1}
    watchdog.cancel()
    self._keep(row)

  def _give_up(self, name):
    self._keep({"name": name, "failure": f"failed: took more than {self._row_seconds:.0f} s", "begun": TRIES})
    print(f"{name}: took more than {self._row_seconds:.0f} s, so this process ends", flush=True)
    os._exit(UNFINISHED)

  def _keep(self, row):
    self.rows[row["name"]] = row
    if self.path:
      write_json(self.path, {**self.head, "rows": list(self.rows.values())})


def one_line(e):
  """An exception in one line."""
  return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"


def read_json(path):
  """The content of a JSON file, or None where there is none. Raises ConfigError if it is no JSON."""
  with contextlib.suppress(FileNotFoundError):
    try:
      return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
      raise ConfigError(f"{path} is no JSON ({error}): remove it or name another file") from None
  return None


def write_json(path, content, **how):
  """Writes a file at once: whoever is cut off while writing leaves the file before."""
  path = pathlib.Path(path)
  part = path.with_name(path.name + ".part")
  part.write_text(json.dumps(content, indent=1, **how) + "\n", encoding="utf-8")
  os.replace(part, path)
