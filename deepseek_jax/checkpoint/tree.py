"""Trees of arrays as a checkpoint stores them: flat names, and whether the saved arrays are those that are expected."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from deepseek_jax.errors import CheckpointError
from deepseek_jax.typing import PyTree

_MAX_LISTED = 8

TreePath = tuple[str, ...]


def flatten_tree(tree: PyTree) -> dict[TreePath, Any]:
  """(name, ..., name) -> leaf. Dataclass fields, dict keys and indices become text; empty nodes are left out."""
  return {tuple(map(_key_name, path)): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def unflatten_to_dicts(flat: Mapping[TreePath, Any]) -> dict[str, Any]:
  """Nested dicts from the result of `flatten_tree`.

  Orbax can restore dicts in part, whatever classes the state is made of.
  """
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    node = tree
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = leaf
  return tree


def check_arrays_match(where: Any, stored: Mapping[TreePath, Any], abstract: PyTree) -> None:
  """Raises CheckpointError that lists the arrays whose path, dtype or shape differ.

  Args:
    where: what to call the checkpoint in the error.
    stored: {path: anything with shape and dtype}. Only what lies below a top-level entry of `abstract` is compared.
    abstract: tree with leaves that have a shape and dtype.
  """
  expected, top_level = flatten_tree(abstract), _top_level_names(abstract)
  stored = {path: leaf for path, leaf in stored.items() if path[0] in top_level}
  mismatches = []
  for path in sorted(stored.keys() | expected.keys()):
    got, want = _type_name(stored.get(path)), _type_name(expected.get(path))
    if got != want:
      mismatches.append(f"{'/'.join(path)}: checkpoint {got}, expected {want}")
  if mismatches:
    raise CheckpointError(
      f"{where} does not fit: {list_first(mismatches)}; use the config it was saved with, or another --workdir"
    )


def list_first(items: Sequence[str]) -> str:
  """The first of `items` in one line, and how many more there are."""
  more = f"; and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
  return "; ".join(items[:_MAX_LISTED]) + more


def _type_name(array: Any) -> str:
  return "nothing" if array is None else f"{array.dtype}[{','.join(map(str, array.shape))}]"


def _top_level_names(tree: PyTree) -> set[str]:
  """Names of the children of the root, also of those without arrays."""
  return {_key_name(path[0]) for path, _ in jax.tree.leaves_with_path(tree, is_leaf=lambda node: node is not tree)}


def _key_name(key: Any) -> str:
  return jax.tree_util.keystr((key,), simple=True)
