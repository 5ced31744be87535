"""The pipeline: layers in stages, microbatches that pass through them, forward and backward in one loop.

Chunk c = v * S + s of the layers is virtual_stage v of stage s of S: a microbatch passes V times through all stages. Work item
i = (g * V + v) * S + r is microbatch g * S + r on virtual_stage v. Stage s does item i forward in tick i + s, and backward, with
the virtual_stages in reverse order, in tick lag + i + S - 1 - s, where lag = (V + 1) * S - 2: in the tick in which the first S
microbatches have passed all chunks. This is interleaved 1F1B (Narayanan et al., arXiv:2104.04473): one forward and one
backward item a tick, so that the inputs kept for the backward pass are at most (V + 2) * S - 2 a stage, however many
microbatches there are; jax.grad of a forward loop would keep all of them.

What comes before and after the layers has no stage of its own: once a group of S microbatches all stages do it at once,
each for one of them, and the results rotate from stage to stage to where they are used. Branches depend on the tick
alone, so that all devices take the same one and meet in its collectives; stages without an item compute on old values,
which are left out of all sums.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.errors import ConfigError
from deepseek_jax.sharding import pvary


def layer_assignment(layers, stages, virtual_stages, assignment=()):
  """Which layer is in which slot: (int32 [stages, virtual_stages, slots], `layers` where a slot is empty; bool mask of full ones).

  Args:
    assignment: layers of each of the stages * virtual_stages chunks in the order in which they run; default: as even as
      possible, earlier chunks take one more. Raises ConfigError when it does not hold `layers` layers.
  """
  chunks = stages * virtual_stages
  each, more = divmod(layers, chunks)
  counts = np.array(assignment or [each + (c < more) for c in range(chunks)])
  if len(counts) != chunks or counts.sum() != layers or (counts < 0).any():
    raise ConfigError(
      f"the {stages} stages x {virtual_stages} virtual_stages need {chunks} numbers of layers with the sum {layers}, not {assignment}: "
      "change them, or leave them out for an even share"
    )
  slot = np.arange(counts.max())
  mask = slot < counts[:, None]  # [chunks, slots]
  table = np.where(mask, (counts.cumsum() - counts)[:, None] + slot, layers)
  table, mask = (
    a.reshape(virtual_stages, stages, -1).swapaxes(0, 1) for a in (table, mask)
  )  # [stages, virtual_stages, slots]
  return table.astype(np.int32), mask


def bubble(stages, virtual_stages, microbatches):
  """Share of the time in which a stage has no item of a microbatch to do: filling, draining, and a last group that is not full."""
  groups = -(-microbatches // stages)
  return 1 - microbatches * virtual_stages / (groups * stages * virtual_stages + stages - 1)


def num_ticks(stages, virtual_stages, microbatches):
  """(Ticks of a step; in how many a stage goes forward, and as often backward; in how many it does first, and so last)."""
  groups = -(-microbatches // stages)
  forward, lag = groups * stages * virtual_stages + stages - 1, (virtual_stages + 1) * stages - 2
  return forward + lag + 1, forward, groups


def to_stage_params(leaf, table, axis, dimension):
  """Parameters of this stage's layers, [virtual_stages, slots, ...]; zeros in empty slots.

  Args:
    leaf: [layers, ...]. Its `dimension` is divided over the mesh axis `axis`, and comes back whole; None: every stage has
      all of it.
    table: of `layer_assignment`.
  """
  if dimension is None:
    return leaf.at[jnp.asarray(table)[jax.lax.axis_index(axis)]].get(mode="fill", fill_value=0)
  rows = leaf.at[table].get(mode="fill", fill_value=0)  # [stages, virtual_stages, slots, ...]
  return jax.lax.all_to_all(rows, axis, 0, dimension + 2, tiled=True)[0]


def pipelined_gradients(first, chunk, last, outer, layers, microbatches, *, axis, virtual_stages):
  """Gradients of the sum of all microbatches' objectives, as far as this stage computes them.

  Called inside a shard_map over all mesh axes with check_vma. An objective that varies over a mesh axis counts as the sum
  over it. The caller adds up over the mesh axes what devices share, the gradients of `outer` over the stages.

  Args:
    first: (outer, microbatch) -> (x, observed): one array, which goes from chunk to chunk.
    chunk: (layers of one virtual_stage [slots, ...], virtual_stage, microbatch, x) -> (y like x, objective, observed). The backward
      pass computes it again from x; what is kept inside it meanwhile is its own jax.checkpoint's business.
    last: (outer, microbatch, y) -> (objective, observed).
    outer: parameters of first and last, the same on all stages. layers: [virtual_stages, slots, ...], this stage's. Both typed
      as varying over all mesh axes.
    microbatches: how many, at least 1; may be traced, the same on all devices. The functions get int32 indices below it.
    axis: mesh axis of the stages. virtual_stages: how often a microbatch passes through all of them.

  Returns:
    (gradients of outer, gradients of layers, observed): sums over the microbatches, of gradients in at least float32;
    observed is (first's, chunk's [virtual_stages, ...], last's).
  """
  work = StageProgram(
    *_typed(first, chunk, last), outer, layers, jnp.asarray(microbatches, jnp.int32), axis, virtual_stages
  )
  ticks = work.forward_ticks + work.lag + 1
  carry = jax.lax.fori_loop(jnp.int32(0), ticks, work.tick, work.start())
  return *carry.gradients, carry.observed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
  """What a stage holds between ticks. Boxes, one [...] of x's shape a stage, rotate by a stage a tick, from s to s - 1."""

  inbox: jax.Array  # box of first's outputs: r ticks after they were computed microbatch r of the group is on stage 0
  arriving: jax.Array  # [...] input of the next forward item, from the stage before
  kept: jax.Array  # [room, ...] inputs of items whose backward is to come
  slots: jax.Array  # place of item i in `kept`, at i modulo the most ticks between its two passes
  freed: jax.Array  # the place that the last backward item left
  turning: jax.Array  # box of the last chunk's outputs on their way to `last`, and of their gradients on the way back
  returning: jax.Array  # [...] gradient of the last backward item, for the stage before
  outbox: jax.Array  # box of the gradients of first's outputs
  gradients: Any  # (outer, layers)
  observed: Any  # (first's, chunk's [virtual_stages, ...], last's)


@dataclasses.dataclass(frozen=True)
class StageProgram:
  """What a stage does in a tick; fields as `pipelined_gradients` has them."""

  first: Callable
  chunk: Callable
  last: Callable
  outer: Any
  layers: Any
  microbatches: jax.Array
  axis: str
  virtual_stages: int

  @property
  def stages(self):
    return jax.lax.axis_size(self.axis)

  @property
  def stage(self):
    return jax.lax.axis_index(self.axis)

  @property
  def period(self):
    """Ticks, and items, of a group of microbatches."""
    return self.stages * self.virtual_stages

  @property
  def lag(self):
    """The tick in which the first group has passed all chunks, and its backward pass begins."""
    return self.period + self.stages - 2

  @property
  def items(self):
    """Those of the last group, which may lack microbatches, included."""
    return -(-self.microbatches // self.stages) * self.period

  @property
  def forward_ticks(self):
    return self.items + self.stages - 1

  def start(self):
    """Zeros, typed as what a tick makes of them: varying over the whole mesh."""

    def zeros(tree):
      return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tree)

    layers, index = _at(self.layers, 0), self.stage
    x, of_first = zeros(jax.eval_shape(self.first, self.outer, index))
    x = pvary(x)
    _, _, of_chunk = jax.eval_shape(self.chunk, layers, index, index, x)
    _, of_last = jax.eval_shape(self.last, self.outer, index, x)
    of_chunk = jax.tree.map(lambda a: jnp.zeros((self.virtual_stages, *a.shape), a.dtype), of_chunk)
    kept = jnp.zeros((self.lag + self.stages, *x.shape), x.dtype)
    slots, gradients = (
      jnp.zeros(self.lag + self.period, jnp.int32),
      jax.tree.map(_wide_zeros, (self.outer, self.layers)),
    )
    return pvary(
      Carry(x, x, kept, slots, jnp.int32(0), x, x, x, gradients, (zeros(of_first), of_chunk, zeros(of_last)))
    )

  def tick(self, tick, carry):
    """Values move just before they are used: while the other direction computes."""
    carry = dataclasses.replace(carry, returning=self.moved(carry.returning, -1), outbox=self.moved(carry.outbox, -1))
    carry = self.together(tick - 2 * self.lag - 1, self.first_backward, carry)
    carry = self.together(tick, self.first_forward, carry)
    carry = _when(tick < self.forward_ticks, lambda carry: self.forward(tick - self.stage, carry), carry)
    carry = self.together(tick - self.lag, self.last_both, carry)
    inbox, turning = self.moved(carry.inbox, -1), self.moved(carry.turning, -1)
    carry = dataclasses.replace(carry, inbox=inbox, arriving=self.moved(carry.arriving, 1), turning=turning)
    late = tick - self.lag
    due = (late >= 0) & (late < self.forward_ticks)
    return _when(due, lambda carry: self.backward(late - (self.stages - 1 - self.stage), carry), carry)

  def forward(self, number, carry):
    virtual_stage, microbatch, exists = self.item(number)
    # Before its first item a stage computes on embeddings too: zeros would all be routed to the same few experts.
    x = jnp.where((number < 0) | (self.stage == 0) & (virtual_stage == 0), carry.inbox, carry.arriving)  # [...]
    # The first items fill `kept`; from then on each takes the place of the one that went backward in the tick before.
    slot = jnp.where(number < carry.kept.shape[0] - 2 * self.stage, jnp.maximum(number, 0), carry.freed)
    y, _, seen = self.chunk(_at(self.layers, virtual_stage), virtual_stage, microbatch, x)
    turns = (self.stage == self.stages - 1) & (virtual_stage == self.virtual_stages - 1)
    of_first, of_chunk, of_last = carry.observed
    return dataclasses.replace(
      carry,
      arriving=y,
      kept=_set(carry.kept, slot, x),
      slots=_set(carry.slots, number % carry.slots.size, slot),
      # One box for both ways: the last stage took the gradient that was here out in an earlier tick.
      turning=jnp.where(turns, y, carry.turning),
      observed=(of_first, _added_at(of_chunk, virtual_stage, seen, exists), of_last),
    )

  def backward(self, number, carry):
    reverse, microbatch, exists = self.item(number)
    virtual_stage = self.virtual_stages - 1 - reverse
    slot = carry.slots[(number + (virtual_stage - reverse) * self.stages) % carry.slots.size]
    turns = (self.stage == self.stages - 1) & (reverse == 0)
    dy = jnp.where(turns, carry.turning, carry.returning)  # [...]

    def outputs(layers, x):
      return self.chunk(layers, virtual_stage, microbatch, x)[:2]

    (_, objective), pull = jax.vjp(outputs, _at(self.layers, virtual_stage), carry.kept[slot])
    of_layers, dx = pull((dy, jnp.ones_like(objective)))
    outer, layers = carry.gradients
    return dataclasses.replace(
      carry,
      freed=slot,
      returning=dx,
      outbox=jnp.where((self.stage == 0) & (virtual_stage == 0), dx, carry.outbox),
      gradients=(outer, _added_at(layers, virtual_stage, of_layers, exists)),
    )

  def first_forward(self, microbatch, exists, carry):
    x, seen = self.first(self.outer, microbatch)
    of_first, *others = carry.observed
    return dataclasses.replace(carry, inbox=x, observed=(_added(of_first, seen, exists), *others))

  def first_backward(self, microbatch, exists, carry):
    _, pull, _ = jax.vjp(lambda outer: self.first(outer, microbatch), self.outer, has_aux=True)
    outer, layers = carry.gradients
    # Nothing is pulled where there is no microbatch, but what comes is added everywhere: of parameters that are kept in
    # shards over the stages, `pull` has the terms of all stages.
    of_outer = pull(jnp.where(exists, carry.outbox, 0))[0]
    return dataclasses.replace(carry, gradients=(jax.tree.map(jnp.add, outer, of_outer), layers))

  def last_both(self, microbatch, exists, carry):
    def function(outer, y):
      return self.last(outer, microbatch, y)

    y = jnp.where(exists, carry.turning, 0)
    objective, pull, seen = jax.vjp(function, self.outer, y, has_aux=True)
    of_outer, dy = pull(jnp.where(exists, jnp.ones_like(objective), 0))  # as in first_backward
    (outer, layers), (*others, of_last) = carry.gradients, carry.observed
    gradients = (jax.tree.map(jnp.add, outer, of_outer), layers)
    return dataclasses.replace(
      carry, turning=dy, gradients=gradients, observed=(*others, _added(of_last, seen, exists))
    )

  def together(self, late, function, carry):
    """`function`, in the first tick of each group, on all stages, each for its own microbatch; `late`: ticks since the first group's."""
    due = (late >= 0) & (late < self.items) & (late % self.period == 0)
    microbatch = self.existing(late // self.period * self.stages + self.stage)
    return _when(due, lambda carry: function(*microbatch, carry), carry)

  def item(self, number):
    """(How many virtual_stages came before, microbatch, whether there is one) of a work item."""
    microbatch = number // self.period * self.stages + number % self.stages
    return number // self.stages % self.virtual_stages, *self.existing(microbatch)

  def existing(self, microbatch):
    """(The nearest microbatch that exists, whether it is this one)."""
    nearest = jnp.clip(microbatch, 0, self.microbatches - 1)
    return nearest, nearest == microbatch

  def moved(self, x, by):
    return jax.lax.ppermute(x, self.axis, [(s, (s + by) % self.stages) for s in range(self.stages)])


def _typed(first, chunk, last):
  """The functions with outputs that vary over the whole mesh; jitted, so that each is traced once for all its uses."""

  def typed_chunk(*args):
    y, objective, observed = chunk(*args)
    return pvary(y), objective, observed

  return jax.jit(lambda *args: pvary(first(*args))), jax.jit(typed_chunk), jax.jit(last)


def _when(due, function, carry):
  return jax.lax.cond(due, function, lambda carry: carry, carry)


def _wide_zeros(param):
  """Where gradients of `param` are summed: in float32 at least."""
  return jnp.zeros(param.shape, jnp.promote_types(param.dtype, jnp.float32))


def _at(tree, index):
  return jax.tree.map(lambda leaf: leaf[index], tree)


def _set(array, index, value):
  """A slice update: XLA does it in place, while it may make a loop of the scatter of `at[index].set`."""
  return jax.lax.dynamic_update_index_in_dim(array, value, index, 0)


def _added(total, part, exists):
  # Selected, not multiplied by zero: what was computed where there is no item may be infinite.
  return jax.tree.map(lambda t, p: t + jnp.where(exists, p, 0), total, part)


def _added_at(total, index, part, exists):
  return jax.tree.map(lambda t, p: _set(t, index, _added(t[index], p, exists)), total, part)
