"""Files of questions and prompts: one JSON object on each line, with fields that are checked."""

import json
import pathlib
from typing import Any, NamedTuple

from deepseek_jax.errors import DataError


class Record(NamedTuple):
  """The fields of a line, and its file and number, for errors."""

  location: str
  fields: dict[str, Any]

  def text(self, *names: str) -> str:
    """The text of the first of the fields `names` that is there. Raises DataError without one, or for other values."""
    name = self.name_of(*names)
    if not isinstance(self.fields[name], str):
      raise DataError(f"{self.location}: the field {name!r} should be text, got {self.fields[name]!r:.60}")
    return self.fields[name]

  def texts(self, name: str, at_least: int) -> list[str]:
    """The list of texts, none of them empty, in the field `name`. Raises DataError for anything else."""
    value = self.fields[self.name_of(name)]
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
      raise DataError(f"{self.location}: the field {name!r} should be a list of texts, none empty, got {value!r:.60}")
    if len(value) < at_least:
      raise DataError(f"{self.location}: the field {name!r} has {len(value)} texts: give at least {at_least}")
    return value

  def name_of(self, *names: str) -> str:
    """The first of the fields `names` that is there. Raises DataError where none is."""
    found = next((name for name in names if name in self.fields), None)
    if found is None:
      expected = " or ".join(map(repr, names))
      raise DataError(f"{self.location} has no field {expected}; its fields: {', '.join(self.fields)[:200] or 'none'}")
    return found


def read_records(path: str, flag: str) -> list[Record]:
  """The lines of the .jsonl file that --`flag` names, without empty ones.

  Raises DataError where it cannot be read, a line is no JSON object of valid Unicode, or there is no line.
  """
  try:
    lines = pathlib.Path(path).expanduser().read_text(encoding="utf-8").split("\n")
  except OSError as error:
    raise DataError(f"--{flag}={path} cannot be read: {error.strerror}") from None
  except UnicodeDecodeError as error:
    raise DataError(f"--{flag}={path} is not UTF-8 at byte {error.start}: save it as UTF-8") from None
  records = []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    location = f"{path}:{number}"
    try:
      fields = json.loads(line)
      json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
      raise DataError(f"{location} has half of a surrogate pair, which is no text: take it out") from None
    except (ValueError, RecursionError) as error:
      raise DataError(f"{location} is not a JSON object: {error}; write one object on each line") from None
    if not isinstance(fields, dict):
      raise DataError(f"{location} is not a JSON object, but {fields!r:.60}: write one object on each line")
    records.append(Record(location, fields))
  if not records:
    raise DataError(f"--{flag}={path} is empty: write one JSON object on each line")
  return records
