"""Which implementation of a kernel runs, and types that all of them need inside shard_map."""

import jax


def chosen(implementations, name, kernel):
  """The function `name` of `implementations`, or for "auto" the first.

  Raises:
    ValueError: there is none of that name.
  """
  if name == "auto":
    return next(iter(implementations.values()))
  if name not in implementations:
    raise ValueError(f"{kernel} has no implementation {name!r}: use auto, {', '.join(implementations)}")
  return implementations[name]


def vary(*trees):
  """`trees` typed as varying over all manual axes that any of their arrays varies over, as loops over them need it.

  The transpose of this cast is the sum of the gradients that the devices contribute.
  """
  varying = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in jax.tree.leaves(trees)))

  def leaf(a):
    missing = tuple(varying - jax.typeof(a).manual_axis_type.varying)
    return jax.lax.pcast(a, missing, to="varying") if missing else a

  return jax.tree.map(leaf, trees)
