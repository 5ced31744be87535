"""Results for people, and as JSON for programs: what is not finite, as the interval of a parameter that the runs do not tell, is null."""

import json
import math
from typing import Any

from deepseek_jax.console import current_console
from deepseek_jax.flags import write_output


def to_json_text(tree: Any) -> str:
  """`tree` as JSON text with a final newline."""
  return json.dumps(_finite(tree), indent=2, allow_nan=False) + "\n"


def show_result(text: str, tree: Any, path: str | None) -> int:
  """Shows `text` for people, and writes `tree` to --json=`path`: to stdout, and nothing else, for "-". Returns exit code 0."""
  if path != "-":
    current_console().print(text)
  if path:
    write_output(to_json_text(tree), path)
  return 0


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _finite(item) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
