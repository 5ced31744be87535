"""Logical axis names and the one table that maps them to mesh axes. Mesh axes are named here and nowhere in the model."""

import math

import jax
from jax.sharding import NamedSharding

# Activations: batch seq heads kv_heads head_dim mlp vocab. Parameters: the same, and `embed`, which fsdp shards.
# The embed dimension of an activation is written None.
RULES = {
  "batch": ("data", "fsdp", "expert"),
  "seq": None,
  "embed": "fsdp",
  "vocab": "tensor",
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "mlp": "tensor",
}


def spec(*axes):
  """PartitionSpec of an array whose dimensions are the logical `axes`; None is a dimension that nothing shards."""
  return jax.P(*(None if axis is None else RULES[axis] for axis in axes))


def gathered(parameter, *axes):
  """`parameter` with its fsdp shards all-gathered for use; the transpose reduce-scatters its gradient."""
  return jax.reshard(parameter, spec(*(None if RULES.get(axis) == "fsdp" else axis for axis in axes)))


def batch_parts(mesh) -> int:
  """Number of shards of the batch dimension."""
  return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def size_per_device(abstract) -> int:
  """Elements that one device holds of an abstract array with a sharding."""
  return math.prod(abstract.sharding.shard_shape(abstract.shape) if abstract.sharding else abstract.shape)


def concrete(abstract, mesh):
  """Abstract arrays of `jax.eval_shape` with shardings that Orbax and ahead-of-time compilation take.

  eval_shape leaves the sharding of replicated arrays None, and an AbstractMesh in the others.
  """

  def leaf(a):
    placement = a.sharding.spec if a.sharding else jax.P(*(None,) * a.ndim)
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, placement))

  return jax.tree.map(leaf, abstract)
