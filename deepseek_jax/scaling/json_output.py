"""JSON for programs: what is not finite, as the interval of a parameter that the runs do not tell, is null."""

import json
import math
from typing import Any


def to_json_text(tree: Any) -> str:
  """`tree` as JSON text with a final newline."""
  return json.dumps(_finite(tree), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _finite(item) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
