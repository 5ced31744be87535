"""Names of types that many modules use."""

from typing import Any

PyTree = Any  # any nesting of dicts, tuples and dataclasses, with arrays as leaves
Params = dict[str, Any]  # nested dicts with arrays as leaves
