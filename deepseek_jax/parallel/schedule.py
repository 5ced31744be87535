"""The formulas of the pipeline's schedule, interleaved 1F1B: what each stage does in each tick.

`parallel.pipeline` runs them on traced values, and `parallel.timeline` draws them. Its docstring explains them.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp


class WorkItem(NamedTuple):
  """One chunk of the layers for one microbatch.

  Attributes:
    item: its number in the order of the stage's forward passes, also where this is its backward pass.
    virtual_stage: which virtual stage of the stage.
    microbatch: which microbatch; the nearest one that exists.
    exists: whether the stage has an item. Otherwise it computes on stale values.
  """

  item: Any
  virtual_stage: Any
  microbatch: Any
  exists: Any


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The schedule of `microbatches` on `stages` with `virtual_stages` each.

  Ticks, stages and items are integers, or int32 arrays of any one shape, which may be traced; so is `microbatches`.
  """

  stages: int
  virtual_stages: int
  microbatches: Any

  @property
  def groups(self) -> Any:
    """Groups of as many microbatches as stages; the last one may not be full."""
    return -(-self.microbatches // self.stages)

  @property
  def period(self) -> int:
    """Ticks, and items, of a group of microbatches."""
    return self.stages * self.virtual_stages

  @property
  def lag(self) -> int:
    """The tick in which the first group has passed all chunks, and its backward pass begins."""
    return self.period + self.stages - 2

  @property
  def items(self) -> Any:
    """Number of items, of a full last group."""
    return self.groups * self.period

  @property
  def pass_ticks(self) -> Any:
    """Number of ticks in which some stage has a forward item. As many have a backward item."""
    return self.items + self.stages - 1

  @property
  def ticks(self) -> Any:
    """Number of ticks of a step. The last one has the backward pass of the last embedding."""
    return self.pass_ticks + self.lag + 1

  @property
  def bubble_fraction(self) -> float:
    """Fraction of the time in which a stage has no item: filling, draining, and a last group that is not full."""
    return 1 - self.microbatches * self.virtual_stages / self.pass_ticks

  def has_forward(self, tick: Any) -> Any:
    """Whether stages do a forward pass in `tick`."""
    return tick < self.pass_ticks

  def has_backward(self, tick: Any) -> Any:
    """Whether stages do a backward pass in `tick`."""
    since_first = tick - self.lag
    return (since_first >= 0) & (since_first < self.pass_ticks)

  def forward_item(self, tick: Any, stage: Any) -> WorkItem:
    """What `stage` does forward in `tick`."""
    item = tick - stage
    virtual_stage, microbatch, exists = self._locate(item)
    return WorkItem(item, virtual_stage, microbatch, exists)

  def backward_item(self, tick: Any, stage: Any) -> WorkItem:
    """What `stage` does backward in `tick`, the virtual stages in reverse order."""
    item = tick - self.lag - (self.stages - 1 - stage)
    reverse_index, microbatch, exists = self._locate(item)
    virtual_stage = self.virtual_stages - 1 - reverse_index
    return WorkItem(item + (virtual_stage - reverse_index) * self.stages, virtual_stage, microbatch, exists)

  def ticks_since_embed(self, tick: Any) -> Any:
    """Ticks since the first forward pass of the embedding."""
    return tick

  def ticks_since_loss(self, tick: Any) -> Any:
    """Ticks since the first loss, forward and backward."""
    return tick - self.lag

  def ticks_since_embed_backward(self, tick: Any) -> Any:
    """Ticks since the first backward pass of the embedding."""
    return tick - 2 * self.lag - 1

  def is_due(self, since_first: Any) -> Any:
    """Whether what all stages do once a group is due, so many ticks after it was first done."""
    return (since_first >= 0) & (since_first < self.items) & (since_first % self.period == 0)

  def group_microbatch(self, since_first: Any, stage: Any) -> tuple[Any, Any]:
    """(microbatch, whether it exists) of `stage` in what is done once a group."""
    return self._clip_microbatch(since_first // self.period * self.stages + stage)

  def _locate(self, item: Any) -> tuple[Any, Any, Any]:
    """(index of the virtual stage in the order of the pass, microbatch, whether that exists) of an item."""
    microbatch = item // self.period * self.stages + item % self.stages
    return item // self.stages % self.virtual_stages, *self._clip_microbatch(microbatch)

  def _clip_microbatch(self, microbatch: Any) -> tuple[Any, Any]:
    """(the nearest microbatch that exists, whether `microbatch` exists)."""
    nearest = jnp.clip(microbatch, 0, self.microbatches - 1)
    return nearest, nearest == microbatch
