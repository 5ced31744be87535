"""Logical axis names and the one table that maps them to mesh axes. Mesh axes are named here and nowhere in the model."""

import math

import jax
from jax.sharding import NamedSharding

# Activations: batch seq heads kv_heads head_dim mlp vocab. Parameters: the same, and `embed`, which fsdp shards.
# The embed dimension of an activation is written None, and so are a latent and the experts.
RULES = {
  "batch": ("data", "fsdp", "expert"),
  "seq": None,
  "embed": "fsdp",
  "vocab": "tensor",
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "mlp": "tensor",
  "latent": "fsdp",
  "experts": "expert",
}


def spec(*axes):
  """PartitionSpec of an array whose dimensions are the logical `axes`; None is a dimension that nothing shards.

  Mesh axes of size 1 in the mesh that is set are left out: they shard nothing, and a dimension of size 1 that carries
  their names loses them in a reshape that adds another one, which then is a type error.
  """
  sizes = jax.sharding.get_abstract_mesh().shape

  def placement(axis):
    names = RULES[axis] if axis else None
    names = (names,) if isinstance(names, str) else names or ()
    names = tuple(name for name in names if sizes.get(name) != 1)
    return names if len(names) > 1 else names[0] if names else None

  return jax.P(*map(placement, axes))


def gathered(parameter, *axes):
  """`parameter` with its fsdp shards all-gathered for use; the transpose reduce-scatters its gradient."""
  return jax.reshard(parameter, spec(*(None if RULES.get(axis) == "fsdp" else axis for axis in axes)))


def partial_sums(*axes):
  """`spec` of the gradient of a `gathered` parameter, of which each device holds the part of its own sequences.

  A loop adds up such parts; they are reduced over the devices once, after it, by jax.reshard to another layout.
  """
  shards = {name for name in RULES["batch"] if jax.sharding.get_abstract_mesh().shape.get(name, 1) > 1}
  return jax.P(*spec(*(None if RULES.get(axis) == "fsdp" else axis for axis in axes)), unreduced=shards)


def on_each_device(function, in_axes, out_axes):
  """`function` applied to what each device holds of arguments laid out by the logical axes `in_axes`.

  A parameter that a device shares with others comes out with the sum of their gradients.
  """
  return jax.shard_map(function, in_specs=tuple(spec(*axes) for axes in in_axes), out_specs=spec(*out_axes))


def summed(x, axis):
  """Inside `on_each_device`: the sum of `x` over the devices that share the logical `axis`."""
  names = tuple(name for name in spec(axis) if name)
  return jax.lax.psum(x, names) if names else x


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
