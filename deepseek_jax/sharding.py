"""Layouts by logical axis names, whose table is in `logical_axes`, and the collectives.

The model names logical axes only; mesh axes are named here.

There are two views of one mesh.
- Outside `spmd`, arrays are global, and `spec` is the layout in their type: parameters, optimizer state, batches.
- Inside `spmd`, each array is one device's shard, and its shape is local. The model runs there. All communication is
  one of the functions below, called where it happens.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from deepseek_jax.logical_axes import FSDP_AXES, RULES
from deepseek_jax.typing import PyTree

# Changes to the table, for `axis_rules`.
UNSHARDED_PARAMS: dict[str, tuple[str, ...]] = {name: () for name in FSDP_AXES}  # all-gathered before the model runs
STAGE_LOCAL = {name: tuple(axis for axis in RULES[name] if axis != "stage") for name in FSDP_AXES}
UNSHARDED_SEQUENCE: dict[str, tuple[str, ...]] = {
  "seq": (),
  "stream": (),
  "latent_seq": (),
}  # decoding: one token at a time
LATENT_RULES: dict[str, dict[str, tuple[str, ...]]] = {
  "replicated": {},
  "sharded": {"latent_seq": ("context", "tensor")},
}

_on_gathered: contextvars.ContextVar[Callable[[jax.Array], jax.Array]] = contextvars.ContextVar(
  "on_gathered", default=lambda parameter: parameter
)
_rules = contextvars.ContextVar("axis_rules", default=RULES)


@contextlib.contextmanager
def axis_rules(changes: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
  """Context in which `changes`, {logical axis: mesh axes}, replace rows of the table. It acts at trace time."""
  token = _rules.set({**_rules.get(), **changes})
  try:
    yield
  finally:
    _rules.reset(token)


@contextlib.contextmanager
def on_gathered_params(function: Callable[[jax.Array], jax.Array]) -> Iterator[None]:
  """Context in which `all_gather_params` returns `function` of each parameter that it has gathered.

  Backward, `function` sees the gradient that this device sends to be reduce-scattered. It acts at trace time.
  """
  token = _on_gathered.set(function)
  try:
    yield
  finally:
    _on_gathered.reset(token)


def mesh_axes(name: str | None) -> tuple[str, ...]:
  """Mesh axes that shard the logical axis `name`: those of size above 1. None, or no mesh: no axes.

  Axes of size 1 are left out, because a dimension of size 1 that carries their names loses them in a reshape that adds
  another such dimension, which is then a type error.
  """
  sizes = jax.sharding.get_abstract_mesh().shape
  return tuple(axis for axis in (_rules.get()[name] if name else ()) if sizes.get(axis, 1) > 1)


def spec(*names: str | None) -> jax.P:
  """PartitionSpec of a global array whose dimensions are the logical axes `names`; None: not sharded."""
  axes_of_dimensions = map(mesh_axes, names)
  return jax.P(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in axes_of_dimensions))


def spmd(function: Callable, in_specs: PyTree, out_specs: PyTree, differentiable: bool = True) -> Callable:
  """`function` as the program of each device of the mesh that is set (`jax.shard_map`): it takes and returns shards.

  Args:
    in_specs, out_specs: PartitionSpecs of the global arrays.
    differentiable: check types (`check_vma`), so that values that vary over devices are told from replicated ones.
      Gradients need this.
  """
  return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=differentiable)


# The functions below are called inside `spmd`, or anywhere on one device.


def pvary(tree: PyTree) -> PyTree:
  """`tree` typed as varying over all mesh axes: each device keeps its own gradients, since JAX inserts no psum."""

  def leaf(x):
    missing = tuple(axis for axis in _active_mesh_axes() if axis not in jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(leaf, tree) if _inside_spmd() else tree


def all_gather_params(parameter: jax.Array, *names: str | None) -> jax.Array:
  """All-gathers the dimensions of `parameter` in FSDP_AXES; `names` are all of them. The transpose reduce-scatters."""
  for dimension, name in enumerate(names):
    if name in FSDP_AXES and mesh_axes(name):
      parameter = jax.lax.all_gather(parameter, mesh_axes(name), axis=dimension, tiled=True)
  return _on_gathered.get()(parameter)


def is_gathered(*names: str | None) -> bool:
  """Whether `all_gather_params` communicates for a parameter of the logical axes `names`."""
  return any(name in FSDP_AXES and mesh_axes(name) for name in names)


def all_gather_sequence(x: jax.Array, from_axis: str = "stream", to_axis: str = "seq") -> jax.Array:
  """All-gathers the sequence of `x` [batch, from_axis, ...] into [batch, to_axis, ...].

  `from_axis` shards the sequence over the mesh axes of `to_axis` and more; the gather is over those additional ones.
  """
  axes = _additional_mesh_axes(from_axis, to_axis)
  return jax.lax.all_gather(x, axes, axis=1, tiled=True) if axes else x


def reduce_scatter_sequence(partial: jax.Array) -> jax.Array:
  """Reduce-scatters `partial` [batch, seq, embed] into [batch, stream, embed].

  `partial` is a term of the sum over the devices that share `mlp` or `heads`.
  """
  scatter_axes = _additional_mesh_axes("stream", "seq")
  sum_axes = tuple(axis for axis in mesh_axes("mlp") if axis not in scatter_axes)
  partial = jax.lax.psum(partial, sum_axes) if sum_axes else partial
  if not scatter_axes:
    return partial
  return jax.lax.psum_scatter(partial, scatter_axes, scatter_dimension=1, tiled=True)


def all_gather(x: jax.Array, name: str, dimension: int) -> jax.Array:
  """All-gathers `dimension` of `x`, which is sharded as the logical axis `name`."""
  return jax.lax.all_gather(x, mesh_axes(name), axis=dimension, tiled=True) if mesh_axes(name) else x


def psum(x: PyTree, *names: str) -> PyTree:
  """The sum of `x` over the devices that share the logical axes `names`."""
  axes = _union_mesh_axes(names)
  return jax.lax.psum(x, axes) if axes else x


def pmax(x: PyTree, *names: str) -> PyTree:
  """The maximum of `x` over the devices that share the logical axes `names`. Not differentiable."""
  axes = _union_mesh_axes(names)
  return jax.lax.pmax(x, axes) if axes else x


def as_replicated(tree: PyTree) -> PyTree:
  """`tree` typed as replicated. Its values must be the same on every device."""

  def leaf(x):
    varying = tuple(axis for axis in _active_mesh_axes() if axis in jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pmax(x, varying) if varying else x

  return jax.tree.map(leaf, tree)


def psum_replicated(gradient: jax.Array, *names: str | None) -> jax.Array:
  """`gradient` of a parameter's shard, summed over the devices that have copies of that shard.

  `names` are the logical axes of the parameter's dimensions.
  """
  sharded = {axis for name in names for axis in mesh_axes(name)}
  replicated = tuple(axis for axis in _active_mesh_axes() if axis not in sharded)
  return jax.lax.psum(gradient, replicated) if replicated else gradient


def reduce_scatter_grads(gradient: jax.Array, *names: str | None) -> jax.Array:
  """The transpose of `all_gather_params`: reduce-scatters the gradient of an all-gathered parameter."""
  for dimension, name in enumerate(names):
    if name in FSDP_AXES and mesh_axes(name):
      gradient = jax.lax.psum_scatter(gradient, mesh_axes(name), scatter_dimension=dimension, tiled=True)
  return gradient


def shard_stack(stack: jax.Array, *names: str | None) -> jax.Array:
  """All-to-all of `stack` [stack, *names]: whole matrices, which share the stack instead of the dimensions `names`.

  The devices that share logical axes of `names` have to divide the stack. The inverse is `unshard_stack`.
  """
  for dimension, name in enumerate(names, start=1):
    if axes := mesh_axes(name):
      blocks = stack.reshape(axis_size(name), -1, *stack.shape[1:])
      blocks = jnp.moveaxis(jax.lax.all_to_all(blocks, axes, 0, 0), 0, dimension)
      stack = jax.lax.collapse(blocks, dimension, dimension + 2)
  return stack


def unshard_stack(stack: jax.Array, *names: str | None) -> jax.Array:
  """The inverse of `shard_stack`: all-to-all of whole matrices, the shared stack, into shards [stack, *names]."""
  for dimension, name in reversed(list(enumerate(names, start=1))):
    if axes := mesh_axes(name):
      shape = *stack.shape[:dimension], axis_size(name), -1, *stack.shape[dimension + 1 :]
      blocks = jnp.moveaxis(stack.reshape(shape), dimension, 0)
      stack = jax.lax.collapse(jax.lax.all_to_all(blocks, axes, 0, 0), 0, 2)
  return stack


def axis_size(*names: str | None) -> int:
  """Number of devices that share the logical axes `names`."""
  return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in _union_mesh_axes(names))


def axis_index(name: str) -> jax.Array:
  """Index [] int32 of this device among those that share the logical axis `name`."""
  return jax.lax.axis_index(mesh_axes(name)) if mesh_axes(name) else jnp.zeros((), jnp.int32)


def rotate_shards(x: jax.Array, name: str) -> jax.Array:
  """The shard of the device before this one, among those that share the logical axis `name`; the first gets the last."""
  devices = axis_size(name)
  return jax.lax.ppermute(x, mesh_axes(name), [(i, (i + 1) % devices) for i in range(devices)]) if devices > 1 else x


def slice_sequence(x: jax.Array, dimension: int, from_axis: str = "seq", to_axis: str = "stream") -> jax.Array:
  """The inverse of `all_gather_sequence`: this device's slice of `dimension`, which is `from_axis` of `x`."""
  axes = _additional_mesh_axes(to_axis, from_axis)
  if not axes:
    return x
  size = x.shape[dimension] // jax.lax.axis_size(axes)
  return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * size, size, dimension)


def _additional_mesh_axes(name: str, other: str) -> tuple[str, ...]:
  """Mesh axes that shard the logical axis `name` and not `other`."""
  return tuple(axis for axis in mesh_axes(name) if axis not in mesh_axes(other))


def _union_mesh_axes(names: tuple[str | None, ...]) -> tuple[str, ...]:
  return tuple(dict.fromkeys(axis for name in names for axis in mesh_axes(name)))


def _active_mesh_axes() -> tuple[str, ...]:
  """Mesh axes of size above 1."""
  return tuple(axis for axis, size in jax.sharding.get_abstract_mesh().shape.items() if size > 1)


def _inside_spmd() -> bool:
  return bool(jax.sharding.get_abstract_mesh().manual_axes)


def num_batch_shards(mesh: Mesh | AbstractMesh) -> int:
  """Number of shards of the batch dimension."""
  return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def elements_per_device(abstract: jax.ShapeDtypeStruct) -> int:
  """Number of elements of one device's shard of an abstract array."""
  return math.prod(abstract.sharding.shard_shape(abstract.shape) if abstract.sharding else abstract.shape)


def with_concrete_shardings(abstract: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
  """A tree of `jax.eval_shape` with shardings on `mesh`, as Orbax and ahead-of-time compilation need them.

  `jax.eval_shape` gives replicated arrays no sharding, and the others one on an AbstractMesh.
  """

  def leaf(a):
    placement = a.sharding.spec if a.sharding else jax.P(*(None,) * a.ndim)
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, placement))

  return jax.tree.map(leaf, abstract)
