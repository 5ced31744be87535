"""Trees of arrays as a checkpoint holds them: names to leaves, and whether what is saved is what is wanted."""

import jax

from deepseek_jax.errors import CheckpointError

_LISTED = 8


def flatten(tree):
  """(name, ..., name) -> leaf. Dataclass fields, dict keys and indices become text, and empty nodes nothing."""
  return {tuple(map(_name, path)): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def nest(flat):
  """Nested dicts from `flatten`'s: a form that Orbax can restore in part, whatever classes the state is made of."""
  tree = {}
  for path, leaf in flat.items():
    node = tree
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = leaf
  return tree


def check_fits(where, stored, abstract):
  """Raises CheckpointError, listing arrays of `where`, unless `stored` {path: with shape and dtype} has all that the
  tree `abstract` has, and nothing more below its entries."""
  wanted, entries = flatten(abstract), _entries(abstract)
  stored = {name: leaf for name, leaf in stored.items() if name[0] in entries}
  pairs = [(name, _type(stored.get(name)), _type(wanted.get(name))) for name in sorted(stored.keys() | wanted.keys())]
  wrong = [f"{'/'.join(name)}: checkpoint {have}, wanted {want}" for name, have, want in pairs if have != want]
  if wrong:
    raise CheckpointError(
      f"{where} does not fit: {listing(wrong)}; use the config it was saved with, or another --workdir"
    )


def listing(items):
  """The first of `items` in one line, and how many more there are."""
  more = f"; and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
  return "; ".join(items[:_LISTED]) + more


def _type(array):
  return "nothing" if array is None else f"{array.dtype}[{','.join(map(str, array.shape))}]"


def _entries(tree):
  """Names of the children of the root, those without arrays too."""
  return {_name(path[0]) for path, _ in jax.tree.leaves_with_path(tree, is_leaf=lambda node: node is not tree)}


def _name(key):
  return jax.tree_util.keystr((key,), simple=True)
