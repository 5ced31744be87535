"""The parameters that are trained, and those that are frozen: of the tree of parameters, two trees that make it up.

Frozen parameters have no gradient, no optimizer state and no update. They are sharded and saved as all parameters are.
"""

import fnmatch
from collections.abc import Sequence

from deepseek_jax.errors import ConfigError
from deepseek_jax.typing import Params


def split_trainable(params: Params, patterns: Sequence[str], path: str = "") -> tuple[Params, Params]:
  """(trainable, frozen): `params`, or another tree of its structure, each with only its own leaves.

  patterns: `optimizer.trainable`: paths as "moe_layers/attn/q/kernel", with * for any text. None: all are trainable.
  path: of `params` in the tree of all parameters.
  """
  if not patterns:
    return params, {}
  trainable: Params = {}
  frozen: Params = {}
  for name, value in params.items():
    name_path = f"{path}/{name}" if path else name
    if isinstance(value, dict):
      parts = split_trainable(value, patterns, name_path)
      for tree, part in zip((trainable, frozen), parts, strict=True):
        if part:
          tree[name] = part
    else:
      is_trainable = any(fnmatch.fnmatchcase(name_path, pattern) for pattern in patterns)
      (trainable if is_trainable else frozen)[name] = value
  return trainable, frozen


def merge_params(a: Params, b: Params) -> Params:
  """The tree of the leaves of `a` and `b`, which have none in common."""
  both = {name: merge_params(a[name], b[name]) for name in a.keys() & b.keys()}
  return a | b | both


def check_trainable(params: Params, patterns: Sequence[str]) -> None:
  """Raises ConfigError for a pattern of `optimizer.trainable` that matches no path of `params`."""
  for pattern in patterns:
    if not split_trainable(params, [pattern])[0]:
      paths = sorted(_paths(params))
      raise ConfigError(
        f"optimizer.trainable={pattern!r} matches no parameter: use * for any text, in paths such as "
        f"{', '.join(paths[:: max(1, len(paths) // 4)][:4])}"
      )


def _paths(params: Params, path: str = "") -> list[str]:
  return [
    found
    for name, value in params.items()
    for found in (_paths(value, f"{path}{name}/") if isinstance(value, dict) else [path + name])
  ]
