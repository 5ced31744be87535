"""The pipeline: layers in stages, microbatches passing through them, forward and backward in one loop.

Chunk c = v * S + s of the layers is circuit v of stage s of S: a microbatch passes V times through all stages. Work item
i = (g * V + v) * S + r is microbatch g * S + r on circuit v. Stage s does item i forward at tick i + s and, with the
circuits in reverse order, backward at tick LAG + i + S - 1 - s, LAG = (V + 1) * S - 2: the tick in which the last stage is
done with the first S microbatches. This is interleaved 1F1B (Narayanan et al., arXiv:2104.04473), one forward and one
backward item a tick, so that the number of kept stage inputs does not depend on the number of microbatches.

What comes before and after the layers has no stage of its own: every S * V ticks all stages do it at once, each for one
microbatch of a group of S, and the results rotate from stage to stage towards where they are used. All branches depend
on the tick alone, so that every device takes the same one and meets the others in its collectives.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.errors import ConfigError


def stage_table(layers, stages, circuits, assignment=()):
  """Which layer is in which slot: (int32 [stages, circuits, slots], `layers` where a slot is empty; bool mask of full ones).

  Args:
    assignment: layers of each of the stages * circuits chunks in the order in which they run; default: as even as
      possible, earlier chunks take one more. Raises ConfigError when it does not hold `layers` layers.
  """
  chunks = stages * circuits
  each, more = divmod(layers, chunks)
  counts = np.array(assignment or [each + (c < more) for c in range(chunks)])
  if len(counts) != chunks or counts.sum() != layers or (counts < 0).any():
    raise ConfigError(
      f"the {stages} stages x {circuits} circuits need {chunks} numbers of layers with the sum {layers}, not {assignment}: "
      "change them, or leave them out for an even share"
    )
  slot = np.arange(counts.max())
  mask = slot < counts[:, None]  # [chunks, slots]
  table = np.where(mask, (counts.cumsum() - counts)[:, None] + slot, layers)
  table, mask = (a.reshape(circuits, stages, -1).swapaxes(0, 1) for a in (table, mask))  # [stages, circuits, slots]
  return table.astype(np.int32), mask


def bubble(stages, circuits, microbatches):
  """Share of the time in which a stage has no item of a microbatch to do: filling, draining, and a last group that is not full."""
  groups = -(-microbatches // stages)
  return 1 - microbatches * circuits / (groups * stages * circuits + stages - 1)


def to_stages(leaf, table, axis, dimension):
  """Parameters of this stage's layers, [circuits, slots, ...]; zeros in empty slots.

  Args:
    leaf: [layers, ...]. Its `dimension` is divided over the mesh axis `axis`, and comes back whole; None: every stage has
      all of it.
    table: of `stage_table`.
  """
  if dimension is None:
    return leaf.at[jnp.asarray(table)[jax.lax.axis_index(axis)]].get(mode="fill", fill_value=0)
  rows = leaf.at[table].get(mode="fill", fill_value=0)  # [stages, circuits, slots, ...]
  return jax.lax.all_to_all(rows, axis, 0, dimension + 2, tiled=True)[0]


def pipelined_gradients(first, chunk, last, outer, layers, microbatches, *, axis, circuits):
  """Gradients of all microbatches' objectives: (of outer, of layers, observed), what this stage did of each.

  Called inside a shard_map over all mesh axes with check_vma. What is optimised is the sum of the objectives, over
  devices as far as their types vary over the mesh; gradients of what stages share are for the caller to add up.

  Args:
    first: (outer, microbatch) -> (x, observed). x: one array, what goes from chunk to chunk.
    chunk: (layers of one circuit [slots, ...], circuit, microbatch, x) -> (y like x, objective, observed). It is computed
      again in the backward pass; what is kept inside is its own jax.checkpoint's business.
    last: (outer, microbatch, y) -> (objective, observed).
    outer: parameters of first and last, the same on all stages. layers: [circuits, slots, ...] of this stage. Both typed
      varying over all mesh axes.
    microbatches: how many, at least 1; may be traced, equal on all devices. Indices that functions get are below it.
    axis: the mesh axis of the stages. circuits: how often a microbatch passes through all of them.

  Returns:
    gradients in the parameters' types, and observed = (first's, chunk's [circuits, ...], last's) sums over microbatches.
  """
  work = Work(*_typed(first, chunk, last), outer, layers, jnp.asarray(microbatches, jnp.int32), axis, circuits)
  lag, end = work.lag, work.end + work.stages - 1
  carry = work.start()
  for lower, upper, tick in ((0, lag, work.filling), (lag, end, work.full), (end, end + lag, work.draining)):
    carry = jax.lax.fori_loop(jnp.int32(lower), jnp.int32(upper), tick, carry)
  return *carry.gradients, carry.observed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
  """What a stage holds between ticks. Boxes rotate by one stage a tick, from s to s - 1."""

  inbox: jax.Array  # box of first's outputs: microbatch r of a group is on stage 0 r ticks after it was computed
  arriving: jax.Array  # input of the next forward item, from the stage before
  kept: jax.Array  # [room, ...] inputs of the items whose backward is to come
  slots: jax.Array  # item i's place in `kept`, at i modulo the longest time between the two passes
  freed: jax.Array  # the place that the last backward item left
  turning: jax.Array  # box of the last chunk's outputs on their way to `last`, and of their gradients on the way back
  returning: jax.Array  # gradient for the next backward item, from the stage after
  outbox: jax.Array  # box of the gradients of first's outputs
  gradients: Any  # [outer, layers]
  observed: Any  # [first's, chunk's, last's]


@dataclasses.dataclass(frozen=True)
class Work:
  """What a stage does in a tick; fields as `pipelined_gradients` has them."""

  first: Callable
  chunk: Callable
  last: Callable
  outer: Any
  layers: Any
  microbatches: jax.Array
  axis: str
  circuits: int

  @property
  def stages(self):
    return jax.lax.axis_size(self.axis)

  @property
  def stage(self):
    return jax.lax.axis_index(self.axis)

  @property
  def period(self):
    """Ticks from one group of microbatches to the next."""
    return self.stages * self.circuits

  @property
  def lag(self):
    """The tick in which the last stage finishes the first group, and begins its backward pass."""
    return self.period + self.stages - 2

  @property
  def end(self):
    """Items of all groups; the last group may hold microbatches that do not exist."""
    return -(-self.microbatches // self.stages) * self.period

  def item(self, number):
    """(circuit counted from the first one done, microbatch, whether that exists) of a work item."""
    microbatch = number // self.period * self.stages + number % self.stages
    return number // self.stages % self.circuits, *self.existing(microbatch)

  def existing(self, microbatch):
    return jnp.clip(microbatch, 0, self.microbatches - 1), (microbatch >= 0) & (microbatch < self.microbatches)

  def moved(self, x, by):
    return jax.lax.ppermute(x, self.axis, [(s, (s + by) % self.stages) for s in range(self.stages)])

  def start(self):
    """Zeros. All carried values vary over the whole mesh: what a tick makes of them does."""
    stage, outer, layers = self.stage, self.outer, jax.tree.map(lambda leaf: leaf[0], self.layers)
    x, seen = jax.eval_shape(self.first, outer, stage)
    box = _varying(jnp.zeros(x.shape, x.dtype))
    _, _, seen_chunk = jax.eval_shape(self.chunk, layers, stage, stage, box)
    _, seen_last = jax.eval_shape(self.last, outer, stage, box)
    seen_chunk = jax.tree.map(lambda a: jax.ShapeDtypeStruct((self.circuits, *a.shape), a.dtype), seen_chunk)
    room, none = self.lag + self.stages, jnp.int32(0)
    zeros = lambda tree: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tree)
    kept, slots = jnp.zeros((room, *box.shape), box.dtype), jnp.zeros(self.lag + self.period, jnp.int32)
    gradients, observed = zeros((self.outer, self.layers)), zeros((seen, seen_chunk, seen_last))
    return _varying(Carry(box, box, kept, slots, none, box, box, box, gradients, observed))

  def filling(self, tick, carry):
    return self.turned(self.forward(tick, carry))

  def full(self, tick, carry):
    carry = self.together(tick - self.lag, self.suffix, self.forward(tick, carry))
    return self.backward(tick, self.turned(carry))

  def draining(self, tick, carry):
    return self.backward(tick, self.turned(carry))

  def turned(self, carry):
    return dataclasses.replace(carry, turning=self.moved(carry.turning, -1))

  def forward(self, tick, carry):
    """The tick's forward item."""
    carry, number = self.together(tick, self.prefix, carry), tick - self.stage
    circuit, microbatch, exists = self.item(number)
    x = jnp.where((self.stage == 0) & (circuit == 0), carry.inbox, carry.arriving)
    # The first items fill `kept`; from then on each takes the place of the one that went backward a tick ago.
    slot = jnp.where(number < len(carry.kept) - 2 * self.stage, jnp.maximum(number, 0), carry.freed)
    y, _, observed = self.chunk(_at(self.layers, circuit), circuit, microbatch, x)
    done = (self.stage == self.stages - 1) & (circuit == self.circuits - 1)
    first, of_chunk, last = carry.observed
    return dataclasses.replace(
      carry,
      inbox=self.moved(carry.inbox, -1),
      arriving=self.moved(y, 1),
      kept=carry.kept.at[slot].set(x),
      slots=carry.slots.at[number % carry.slots.size].set(slot),
      turning=jnp.where(done, y, carry.turning),
      observed=(first, _added_at(of_chunk, circuit, observed, exists), last),
    )

  def backward(self, tick, carry):
    """The tick's backward item."""
    number = tick - self.lag - (self.stages - 1 - self.stage)
    circuit, microbatch, exists = self.item(number)
    forward_number = number + (self.circuits - 1 - 2 * circuit) * self.stages
    circuit = self.circuits - 1 - circuit
    slot = carry.slots[forward_number % carry.slots.size]
    dy = jnp.where((self.stage == self.stages - 1) & (circuit == self.circuits - 1), carry.turning, carry.returning)

    def outputs(layers, x):
      return self.chunk(layers, circuit, microbatch, x)[:2]

    (_, objective), pull = jax.vjp(outputs, _at(self.layers, circuit), carry.kept[slot])
    grads, dx = pull((dy, jnp.ones_like(objective)))
    outer, layers = carry.gradients
    carry = dataclasses.replace(
      carry,
      freed=slot,
      returning=self.moved(dx, -1),
      outbox=self.moved(jnp.where((self.stage == 0) & (circuit == 0), dx, carry.outbox), -1),
      gradients=(outer, _added_at(layers, circuit, grads, exists)),
    )
    return self.together(tick - 2 * self.lag, self.prefix_backward, carry)

  def together(self, tick, work, carry):
    """`work` of all stages at once, each for its microbatch of a group, in the ticks 0, period, 2 * period ... of the groups."""
    microbatch, exists = self.existing(tick // self.period * self.stages + self.stage)
    due = (tick % self.period == 0) & (tick >= 0) & (tick < self.end)
    return jax.lax.cond(due, lambda carry: work(microbatch, exists, carry), lambda carry: carry, carry)

  def prefix(self, microbatch, exists, carry):
    x, observed = self.first(self.outer, microbatch)
    first, of_chunk, last = carry.observed
    return dataclasses.replace(carry, inbox=x, observed=(_added(first, observed, exists), of_chunk, last))

  def prefix_backward(self, microbatch, exists, carry):
    _, pull = jax.vjp(lambda outer: self.first(outer, microbatch)[0], self.outer)
    outer, layers = carry.gradients
    return dataclasses.replace(carry, gradients=(_added(outer, pull(carry.outbox)[0], exists), layers))

  def suffix(self, microbatch, exists, carry):
    objective, pull, observed = jax.vjp(
      lambda outer, y: self.last(outer, microbatch, y), self.outer, carry.turning, has_aux=True
    )
    grads, dy = pull(jnp.ones_like(objective))
    (outer, layers), (first, of_chunk, last) = carry.gradients, carry.observed
    gradients, observed = (_added(outer, grads, exists), layers), (first, of_chunk, _added(last, observed, exists))
    return dataclasses.replace(carry, turning=dy, gradients=gradients, observed=observed)


def _typed(first, chunk, last):
  """The functions with results that vary over the whole mesh, and jitted: each is traced once, wherever it is called."""

  def typed_chunk(*args):
    y, objective, observed = chunk(*args)
    return _varying(y), objective, observed

  return jax.jit(lambda *args: _varying(first(*args))), jax.jit(typed_chunk), jax.jit(last)


def _varying(tree):
  """The same values, typed as varying over all mesh axes."""
  axes = jax.sharding.get_abstract_mesh().axis_names

  def cast(leaf):
    missing = tuple(a for a in axes if a not in jax.typeof(leaf).manual_axis_type.varying)
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

  return jax.tree.map(cast, tree)


def _at(tree, index):
  return jax.tree.map(lambda leaf: leaf[index], tree)


# Selected, not multiplied by zero: what is computed for an item that does not exist may be NaN.


def _added(total, part, exists):
  return jax.tree.map(lambda t, p: jnp.where(exists, t + p, t), total, part)


def _added_at(total, index, part, exists):
  return jax.tree.map(lambda t, p: t.at[index].add(jnp.where(exists, p, 0)), total, part)
