"""Pipeline parallelism: layers in stages, microbatches that pass through them, forward and backward in one loop.

This is interleaved 1F1B (Narayanan et al., arXiv:2104.04473) with S stages and V virtual stages on each:

- Chunk c = v * S + s of the layers is virtual stage v of stage s. A microbatch passes through all stages V times.
- Work item i = (g * V + v) * S + r is microbatch g * S + r on virtual stage v. S microbatches are a group, here group
  g.
- Stage s does the forward pass of item i in tick i + s.
- It does the backward pass of item i in tick lag + i + S - 1 - s, with the virtual stages in reverse order, where
  lag = (V + 1) * S - 2 is the tick in which the first group has passed all chunks.

So a tick has one forward and one backward item. At most (V + 2) * S - 2 inputs a stage are saved for the backward pass,
for any number of microbatches. `jax.grad` of a forward loop would save all of them.

What comes before the layers (the embedding) and after them (the loss) has no stage of its own. Once a group, all stages
compute it at the same time, each for one microbatch, and the results rotate from stage to stage to where they are used.

Branches depend on the tick alone, so that all devices take the same branch and meet in its collectives. Stages without
an item compute on stale values, which are left out of all sums.

`parallel.schedule` has these formulas. `python -m deepseek_jax.plan --timeline` draws them, as does
docs/explanation/pipeline.md for 2 stages, 2 virtual stages and 4 microbatches.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.errors import ConfigError
from deepseek_jax.parallel.schedule import Schedule
from deepseek_jax.sharding import pvary
from deepseek_jax.typing import Params, PyTree


def layer_assignment(
  layers: int, stages: int, virtual_stages: int, assignment: Sequence[int] = ()
) -> tuple[np.ndarray, np.ndarray]:
  """Which layer is in which slot.

  Args:
    assignment: number of layers of each of the stages * virtual_stages chunks, in order of execution. Default: as even
      as possible, earlier chunks take one more.

  Returns:
    (table int32 [stages, virtual_stages, slots], where `layers` is an empty slot; mask bool, True for full slots).

  Raises:
    ConfigError: `assignment` has another number of chunks or of layers.
  """
  chunks = stages * virtual_stages
  quotient, remainder = divmod(layers, chunks)
  counts = np.array(assignment or [quotient + (chunk < remainder) for chunk in range(chunks)])
  if len(counts) != chunks or counts.sum() != layers or (counts < 0).any():
    raise ConfigError(
      f"parallel.stage_layers must have {chunks} numbers ({stages} stages x {virtual_stages} virtual stages) that sum to "
      f"{layers}, got {assignment}"
    )
  slot = np.arange(counts.max())
  mask = slot < counts[:, None]  # [chunks, slots]
  first_layer = counts.cumsum() - counts
  table = np.where(mask, first_layer[:, None] + slot, layers)

  def by_stage(a):  # [stages, virtual_stages, slots]
    return a.reshape(virtual_stages, stages, -1).swapaxes(0, 1)

  return by_stage(table).astype(np.int32), by_stage(mask)


def to_stage_params(leaf: jax.Array, table: np.ndarray, axis: str, dimension: int | None) -> jax.Array:
  """Parameters of this stage's layers, [virtual_stages, slots, ...], with zeros in empty slots.

  Args:
    leaf: [layers, ...]. Its `dimension` is sharded over the mesh axis `axis`, and comes back unsharded. None: it is not
      sharded over the stages.
    table: of `layer_assignment`.
  """
  if dimension is None:
    return leaf.at[jnp.asarray(table)[jax.lax.axis_index(axis)]].get(mode="fill", fill_value=0)
  by_stage = leaf.at[table].get(mode="fill", fill_value=0)  # [stages, virtual_stages, slots, ...]
  return jax.lax.all_to_all(by_stage, axis, 0, dimension + 2, tiled=True)[0]


def interleaved_1f1b(
  embed_fn: Callable,
  chunk_fn: Callable,
  loss_fn: Callable,
  outer_params: Params,
  layer_params: PyTree,
  microbatches: jax.Array | int,
  *,
  axis: str,
  virtual_stages: int,
) -> tuple[Params, PyTree, tuple[PyTree, PyTree, PyTree]]:
  """Gradients of the sum of all microbatches' objectives, as far as this stage computes them.

  Called inside a shard_map over all mesh axes with check_vma. An objective that varies over a mesh axis counts as the
  sum over that axis. The caller sums gradients over the mesh axes on which a parameter is replicated; `outer_params`
  are replicated over the stages.

  Args:
    embed_fn: (outer_params, microbatch) -> (x, objective [], aux). x is one array, which goes from chunk to chunk. The
      objective varies over the stages.
    chunk_fn: (layer_params of one virtual stage [slots, ...], virtual_stage, microbatch, x) -> (y like x, objective [],
      aux). The backward pass computes it again from x. A jax.checkpoint inside it decides what is saved meanwhile.
    loss_fn: (outer_params, microbatch, y) -> (objective [], aux).
    outer_params: of embed_fn and loss_fn, the same on all stages.
    layer_params: this stage's, [virtual_stages, slots, ...]. Both are typed as varying over all mesh axes.
    microbatches: how many, at least 1. May be traced, the same on all devices. The functions get int32 indices below
      it.
    axis: mesh axis of the stages.

  Returns:
    (gradients of outer_params, gradients of layer_params, aux): sums over the microbatches, gradients in at least
    float32. aux is (embed_fn's, chunk_fn's [virtual_stages, ...], loss_fn's).
  """
  embed_fn, chunk_fn, loss_fn = _with_varying_outputs(embed_fn, chunk_fn, loss_fn)
  microbatches = jnp.asarray(microbatches, jnp.int32)
  program = StageProgram(embed_fn, chunk_fn, loss_fn, outer_params, layer_params, microbatches, axis, virtual_stages)
  carry = jax.lax.fori_loop(jnp.int32(0), program.schedule.ticks, program.tick, program.initial_carry())
  return *carry.gradients, carry.aux


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
  """What a stage holds between ticks. A rotating box has the shape of x and moves each tick, from stage s to s - 1."""

  # Rotating box of embed_fn's outputs: r ticks after they were computed, stage 0 has microbatch r of the group.
  inbox: jax.Array
  arriving: jax.Array  # [...] input of the next forward item, from the stage before
  saved_inputs: jax.Array  # [saved_slots, ...] inputs of items whose backward pass is to come
  item_slots: (
    jax.Array
  )  # slot in saved_inputs of item i, at i modulo the largest number of ticks between its two passes
  free_slot: jax.Array  # [] slot in saved_inputs that the last backward item left
  # Rotating box of the last chunk's outputs on their way to loss_fn, and of their gradients on the way back.
  turnaround: jax.Array
  arriving_grad: jax.Array  # [...] gradient of the last backward item's input, for the stage before
  outbox: jax.Array  # rotating box of the gradients of embed_fn's outputs
  gradients: tuple[Params, PyTree]  # (of outer_params, of layer_params)
  aux: tuple[PyTree, PyTree, PyTree]  # (embed_fn's, chunk_fn's [virtual_stages, ...], loss_fn's)


@dataclasses.dataclass(frozen=True)
class StageProgram:
  """What a stage does in a tick. Fields are as in `interleaved_1f1b`."""

  embed_fn: Callable
  chunk_fn: Callable
  loss_fn: Callable
  outer_params: Params
  layer_params: PyTree
  microbatches: jax.Array
  axis: str
  virtual_stages: int

  @property
  def stages(self) -> int:
    return jax.lax.axis_size(self.axis)

  @property
  def stage(self) -> jax.Array:
    return jax.lax.axis_index(self.axis)

  @property
  def schedule(self) -> Schedule:
    return Schedule(self.stages, self.virtual_stages, self.microbatches)

  def initial_carry(self) -> Carry:
    """Zeros, typed as what a tick makes of them: varying over the whole mesh."""

    def zeros(tree):
      return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tree)

    chunk_params, index, schedule = _tree_at(self.layer_params, 0), self.stage, self.schedule
    x, _, embed_aux = zeros(jax.eval_shape(self.embed_fn, self.outer_params, index))
    x = pvary(x)
    _, _, chunk_aux = jax.eval_shape(self.chunk_fn, chunk_params, index, index, x)
    _, loss_aux = jax.eval_shape(self.loss_fn, self.outer_params, index, x)
    chunk_aux = jax.tree.map(lambda a: jnp.zeros((self.virtual_stages, *a.shape), a.dtype), chunk_aux)
    carry = Carry(
      inbox=x,
      arriving=x,
      saved_inputs=jnp.zeros((schedule.lag + self.stages, *x.shape), x.dtype),
      item_slots=jnp.zeros(schedule.lag + schedule.period, jnp.int32),
      free_slot=jnp.int32(0),
      turnaround=x,
      arriving_grad=x,
      outbox=x,
      gradients=jax.tree.map(_zero_gradient, (self.outer_params, self.layer_params)),
      aux=(zeros(embed_aux), chunk_aux, zeros(loss_aux)),
    )
    return pvary(carry)

  def tick(self, tick: jax.Array, carry: Carry) -> Carry:
    """One tick. Values are sent just before they are used, while the other direction computes."""
    schedule = self.schedule
    arriving_grad, outbox = self.send(carry.arriving_grad, -1), self.send(carry.outbox, -1)
    carry = dataclasses.replace(carry, arriving_grad=arriving_grad, outbox=outbox)
    carry = self.once_per_group(schedule.ticks_since_embed_backward(tick), self.embed_backward, carry)
    carry = self.once_per_group(schedule.ticks_since_embed(tick), self.embed_forward, carry)
    carry = _when(schedule.has_forward(tick), functools.partial(self.chunk_forward, tick), carry)
    carry = self.once_per_group(schedule.ticks_since_loss(tick), self.loss_forward_backward, carry)
    inbox, turnaround = self.send(carry.inbox, -1), self.send(carry.turnaround, -1)
    carry = dataclasses.replace(carry, inbox=inbox, arriving=self.send(carry.arriving, 1), turnaround=turnaround)
    return _when(schedule.has_backward(tick), functools.partial(self.chunk_backward, tick), carry)

  def chunk_forward(self, tick: jax.Array, carry: Carry) -> Carry:
    """The forward pass of a work item."""
    item, virtual_stage, microbatch, exists = self.schedule.forward_item(tick, self.stage)
    # Before its first item a stage computes on embeddings too: zeros would all be routed to the same few experts.
    x = jnp.where((item < 0) | (self.stage == 0) & (virtual_stage == 0), carry.inbox, carry.arriving)  # [...]
    # The first items fill `saved_inputs`. Later ones take the slot of the item that went backward in the tick before.
    is_filling = item < carry.saved_inputs.shape[0] - 2 * self.stage
    slot = jnp.where(is_filling, jnp.maximum(item, 0), carry.free_slot)
    y, _, aux = self.chunk_fn(_tree_at(self.layer_params, virtual_stage), virtual_stage, microbatch, x)
    is_last_chunk = (self.stage == self.stages - 1) & (virtual_stage == self.virtual_stages - 1)
    embed_aux, chunk_aux, loss_aux = carry.aux
    return dataclasses.replace(
      carry,
      arriving=y,
      saved_inputs=_set(carry.saved_inputs, slot, x),
      item_slots=_set(carry.item_slots, item % carry.item_slots.size, slot),
      # One box serves both ways: the last stage took the gradient that was here out in an earlier tick.
      turnaround=jnp.where(is_last_chunk, y, carry.turnaround),
      aux=(embed_aux, _add_at(chunk_aux, virtual_stage, aux, exists), loss_aux),
    )

  def chunk_backward(self, tick: jax.Array, carry: Carry) -> Carry:
    """The backward pass of a work item."""
    item, virtual_stage, microbatch, exists = self.schedule.backward_item(tick, self.stage)
    slot = carry.item_slots[item % carry.item_slots.size]
    is_last_chunk = (self.stage == self.stages - 1) & (virtual_stage == self.virtual_stages - 1)
    dy = jnp.where(is_last_chunk, carry.turnaround, carry.arriving_grad)  # [...]

    def outputs(chunk_params, x):
      return self.chunk_fn(chunk_params, virtual_stage, microbatch, x)[:2]

    chunk_params = _tree_at(self.layer_params, virtual_stage)
    (_, objective), vjp = jax.vjp(outputs, chunk_params, carry.saved_inputs[slot])
    chunk_grads, dx = vjp((dy, jnp.ones_like(objective)))
    outer_grads, layer_grads = carry.gradients
    return dataclasses.replace(
      carry,
      free_slot=slot,
      arriving_grad=dx,
      outbox=jnp.where((self.stage == 0) & (virtual_stage == 0), dx, carry.outbox),
      gradients=(outer_grads, _add_at(layer_grads, virtual_stage, chunk_grads, exists)),
    )

  def embed_forward(self, microbatch: jax.Array, exists: jax.Array, carry: Carry) -> Carry:
    x, _, aux = self.embed_fn(self.outer_params, microbatch)
    embed_aux, *other_aux = carry.aux
    return dataclasses.replace(carry, inbox=x, aux=(_add(embed_aux, aux, exists), *other_aux))

  def embed_backward(self, microbatch: jax.Array, exists: jax.Array, carry: Carry) -> Carry:
    def outputs(outer_params):
      return self.embed_fn(outer_params, microbatch)[:2]

    (_, objective), vjp = jax.vjp(outputs, self.outer_params)
    # The cotangent is zero where there is no microbatch. The result is added in any case: of parameters sharded over
    # the stages, `vjp` gives the terms of all stages.
    (grads,) = vjp((jnp.where(exists, carry.outbox, 0), jnp.where(exists, jnp.ones_like(objective), 0)))
    outer_grads, layer_grads = carry.gradients
    return dataclasses.replace(carry, gradients=(jax.tree.map(jnp.add, outer_grads, grads), layer_grads))

  def loss_forward_backward(self, microbatch: jax.Array, exists: jax.Array, carry: Carry) -> Carry:
    def function(outer_params, y):
      return self.loss_fn(outer_params, microbatch, y)

    y = jnp.where(exists, carry.turnaround, 0)
    objective, vjp, aux = jax.vjp(function, self.outer_params, y, has_aux=True)
    grads, dy = vjp(jnp.where(exists, jnp.ones_like(objective), 0))  # as in embed_backward
    (outer_grads, layer_grads), (*other_aux, loss_aux) = carry.gradients, carry.aux
    gradients = (jax.tree.map(jnp.add, outer_grads, grads), layer_grads)
    aux = (*other_aux, _add(loss_aux, aux, exists))
    return dataclasses.replace(carry, turnaround=dy, gradients=gradients, aux=aux)

  def once_per_group(self, ticks: jax.Array, function: Callable[..., Carry], carry: Carry) -> Carry:
    """Calls `function` once a group, on all stages, each with its own microbatch. `ticks`: since the first call."""
    microbatch, exists = self.schedule.group_microbatch(ticks, self.stage)
    return _when(self.schedule.is_due(ticks), lambda carry: function(microbatch, exists, carry), carry)

  def send(self, x: jax.Array, by: int) -> jax.Array:
    """`x` of the stage `by` before this one: every stage sends its own to stage s + `by`."""
    return jax.lax.ppermute(x, self.axis, [(s, (s + by) % self.stages) for s in range(self.stages)])


def _with_varying_outputs(
  embed_fn: Callable, chunk_fn: Callable, loss_fn: Callable
) -> tuple[Callable, Callable, Callable]:
  """The functions with outputs typed as varying over the whole mesh, and jitted, so that each is traced only once."""

  def varying_embed(*args):
    x, objective, aux = embed_fn(*args)
    return pvary(x), objective, aux

  def varying_chunk(*args):
    y, objective, aux = chunk_fn(*args)
    return pvary(y), objective, aux

  return jax.jit(varying_embed), jax.jit(varying_chunk), jax.jit(loss_fn)


def _when(due: jax.Array, function: Callable[[Carry], Carry], carry: Carry) -> Carry:
  return jax.lax.cond(due, function, lambda carry: carry, carry)


def _zero_gradient(param: jax.Array) -> jax.Array:
  """Where gradients of `param` are summed: in at least float32."""
  return jnp.zeros(param.shape, jnp.promote_types(param.dtype, jnp.float32))


def _tree_at(tree: PyTree, index: int | jax.Array) -> PyTree:
  return jax.tree.map(lambda leaf: leaf[index], tree)


def _set(array: jax.Array, index: jax.Array, value: jax.Array) -> jax.Array:
  """A slice update: XLA does it in place, while it may make a loop of the scatter of `at[index].set`."""
  return jax.lax.dynamic_update_index_in_dim(array, value, index, 0)


def _add(total: PyTree, term: PyTree, exists: jax.Array) -> PyTree:
  # Selected, not multiplied by zero: what was computed where there is no item may be infinite.
  return jax.tree.map(lambda t, x: t + jnp.where(exists, x, 0), total, term)


def _add_at(total: PyTree, index: jax.Array, term: PyTree, exists: jax.Array) -> PyTree:
  return jax.tree.map(lambda t, x: _set(t, index, _add(t[index], x, exists)), total, term)
