"""Logical axis names, the one table that maps them to mesh axes, and the collectives. Mesh axes are named here and nowhere in the model.

Two views of one mesh. Outside, arrays are whole and `spec` is the layout in their type: parameters, moments, batches. The
model runs inside `spmd`, where each array is what one device holds, and all communication is one of the
functions below, called where it happens.
"""

import contextlib
import contextvars
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

RULES = {
  # What the dimensions of activations are shared over. `stream` is the sequence between blocks, `seq` inside them.
  "batch": ("data", "fsdp", "expert"),
  "seq": ("context",),
  "stream": ("context", "tensor"),
  "latent_seq": ("context",),
  # Of activations and parameters both.
  "vocab": ("tensor",),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "mlp": ("tensor",),
  "head_dim": (),
  "experts": ("expert",),
  "stages": ("stage",),
  # Of parameters, which are kept in shards and made whole for use (`all_gather_params`). `stage` comes last: see `to_stage_params` in parallel/pipeline.py.
  "embed": ("fsdp", "expert", "context", "stage"),
  "latent": ("fsdp", "stage"),
  "expert_embed": ("fsdp", "context", "stage"),
}
FSDP_AXES = ("embed", "latent", "expert_embed")

# Changes to the table, for `rules`.
UNSHARDED_PARAMS = {name: () for name in FSDP_AXES}  # made whole once, before the model runs
STAGE_LOCAL = {name: tuple(axis for axis in RULES[name] if axis != "stage") for name in FSDP_AXES}
UNSHARDED_SEQUENCE = {"seq": (), "stream": (), "latent_seq": ()}  # decoding: a token at a time
LATENT_RULES = {"replicated": {}, "sharded": {"latent_seq": ("context", "tensor")}}

_rules = contextvars.ContextVar("rules", default=RULES)


@contextlib.contextmanager
def rules(changes):
  """While it lasts, rows of the table read as `changes` says: {logical axis: mesh axes}. It acts at trace time."""
  token = _rules.set(_rules.get() | changes)
  try:
    yield
  finally:
    _rules.reset(token)


def mesh_axes(name) -> tuple[str, ...]:
  """Mesh axes that share the logical axis `name`, which may be None; those of size 1 share nothing, nor does any without a mesh.

  A dimension of size 1 that carries such names loses them in a reshape that adds another one, which then is a type error.
  """
  sizes = jax.sharding.get_abstract_mesh().shape
  return tuple(axis for axis in (_rules.get()[name] if name else ()) if sizes.get(axis, 1) > 1)


def spec(*names):
  """PartitionSpec of a whole array whose dimensions are the logical axes `names`; None is a dimension that nothing shards."""
  found = map(mesh_axes, names)
  return jax.P(*(a if len(a) > 1 else a[0] if a else None for a in found))


def spmd(function, in_specs, out_specs, differentiable=True):
  """`function` as the program of each device of the mesh that is set: of whole arrays it sees, and returns, its shards.

  What is to be differentiated has its types checked: a value that varies over devices is told from one that they share.
  """
  return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=differentiable)


# The rest is called inside `spmd`, or anywhere on one device.


def pvary(tree):
  """`tree` typed as different on every device, so that its gradients stay what each device found: none is summed unseen."""

  def leaf(x):
    missing = tuple(axis for axis in _active_mesh_axes() if axis not in jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(leaf, tree) if _manual() else tree


def all_gather_params(parameter, *names):
  """`parameter`, of dimensions `names`, with the dimensions of FSDP_AXES whole; the transpose reduce-scatters."""
  for dimension, name in enumerate(names):
    if name in FSDP_AXES and mesh_axes(name):
      parameter = jax.lax.all_gather(parameter, mesh_axes(name), axis=dimension, tiled=True)
  return parameter


def all_gather_sequence(x, held="stream", wanted="seq"):
  """`x` [batch, positions of `held`, ...] with all positions of `wanted`, of which `held` shares out each device's."""
  inner = tuple(axis for axis in mesh_axes(held) if axis not in mesh_axes(wanted))
  return jax.lax.all_gather(x, inner, axis=1, tiled=True) if inner else x


def reduce_scatter_sequence(partial):
  """`partial` [batch, seq, embed], terms of a sum over the devices that share `mlp` or `heads`, as the sum's own positions."""
  inner = tuple(axis for axis in mesh_axes("stream") if axis not in mesh_axes("seq"))
  all_gather = tuple(axis for axis in mesh_axes("mlp") if axis not in inner)
  partial = jax.lax.psum(partial, all_gather) if all_gather else partial
  return jax.lax.psum_scatter(partial, inner, scatter_dimension=1, tiled=True) if inner else partial


def whole(x, name, dimension):
  """`x` with all of its `dimension`, which devices share as the logical axis `name`."""
  return jax.lax.all_gather(x, mesh_axes(name), axis=dimension, tiled=True) if mesh_axes(name) else x


def psum(x, *names):
  """The sum of `x` over the devices that share the logical axes `names`."""
  over = _union(names)
  return jax.lax.psum(x, over) if over else x


def pmax(x, *names):
  """The maximum of `x` over the devices that share the logical axes `names`. Not differentiable."""
  over = _union(names)
  return jax.lax.pmax(x, over) if over else x


def as_replicated(tree):
  """`tree`, whose values are the same on every device, typed so."""

  def leaf(x):
    over = tuple(axis for axis in _active_mesh_axes() if axis in jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pmax(x, over) if over else x

  return jax.tree.map(leaf, tree)


def psum_replicated(gradient, *names):
  """`gradient` of a parameter's own shard, of dimensions `names`, summed over the devices that have copies of it."""
  held = {axis for name in names for axis in mesh_axes(name)}
  others = tuple(axis for axis in _active_mesh_axes() if axis not in held)
  return jax.lax.psum(gradient, others) if others else gradient


def reduce_scatter_grads(gradient, *names):
  """The transpose of `all_gather_params`: terms of a sum over devices, of the whole parameter -> each device's shard of the sum."""
  for dimension, name in enumerate(names):
    if name in FSDP_AXES and mesh_axes(name):
      gradient = jax.lax.psum_scatter(gradient, mesh_axes(name), scatter_dimension=dimension, tiled=True)
  return gradient


def axis_size(*names) -> int:
  """Number of devices that share the logical axes `names`."""
  return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in _union(names))


def axis_index(name):
  """Index of this device among those that share the logical axis `name`: which of its parts it holds."""
  return jax.lax.axis_index(mesh_axes(name)) if mesh_axes(name) else jnp.zeros((), jnp.int32)


def slice_sequence(x, dimension, held="stream", wanted="seq"):
  """The inverse of `all_gather_sequence`: this device's positions of `held`, of an `x` that has those of `wanted` along `dimension`."""
  inner = tuple(axis for axis in mesh_axes(held) if axis not in mesh_axes(wanted))
  if not inner:
    return x
  size = x.shape[dimension] // jax.lax.axis_size(inner)
  return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(inner) * size, size, dimension)


def _union(names):
  return tuple(dict.fromkeys(axis for name in names for axis in mesh_axes(name)))


def _active_mesh_axes():
  return tuple(axis for axis, size in jax.sharding.get_abstract_mesh().shape.items() if size > 1)


def _manual():
  return bool(jax.sharding.get_abstract_mesh().manual_axes)


def num_batch_shards(mesh) -> int:
  """Number of shards of the batch dimension."""
  return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def elements_per_device(abstract) -> int:
  """Elements that one device holds of an abstract array with a sharding."""
  return math.prod(abstract.sharding.shard_shape(abstract.shape) if abstract.sharding else abstract.shape)


def with_concrete_shardings(abstract, mesh):
  """Abstract arrays of `jax.eval_shape` with shardings that Orbax and ahead-of-time compilation take.

  eval_shape leaves the sharding of replicated arrays None, and an AbstractMesh in the others.
  """

  def leaf(a):
    placement = a.sharding.spec if a.sharding else jax.P(*(None,) * a.ndim)
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, placement))

  return jax.tree.map(leaf, abstract)
