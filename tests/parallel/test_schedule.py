"""The schedule's formulas: its numbers, and that the program does in each tick what they say."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from deepseek_jax.parallel import pipeline
from deepseek_jax.parallel.schedule import Schedule
from deepseek_jax.parallel.timeline import group_work, work_items
from deepseek_jax.sharding import pvary

pytestmark = pytest.mark.jax_version


def test_bubble():
  assert Schedule(1, 1, 5).bubble_fraction == 0
  assert Schedule(4, 1, 8).bubble_fraction == pytest.approx(3 / 11)
  assert Schedule(4, 2, 8).bubble_fraction == pytest.approx(3 / 19)
  # Three microbatches of the second group are not there.
  assert Schedule(4, 2, 5).bubble_fraction == pytest.approx(1 - 10 / 19)


@pytest.mark.parametrize("sizes", [(2, 2, 4), (4, 2, 5), (4, 1, 8), (3, 3, 1), (1, 2, 3)])
def test_every_item_has_one_pass_each_way_after_what_it_needs(sizes):
  stages, virtual_stages, microbatches = sizes
  schedule = Schedule(*sizes)
  done = collections.defaultdict(dict)  # {"forward" or "backward": {(microbatch, chunk): tick}}
  for name, items in zip(("forward", "backward"), work_items(schedule), strict=True):
    for stage, tick in np.argwhere(items.exists).tolist():
      key = int(items.microbatch[stage, tick]), int(items.virtual_stage[stage, tick]) * stages + stage
      assert key not in done[name]
      done[name][key] = tick
    has_pass = getattr(schedule, f"has_{name}")(np.arange(schedule.ticks))
    assert has_pass.sum() == schedule.pass_ticks
    # A bubble is a tick with such a pass in which the stage has no item.
    np.testing.assert_allclose(1 - items.exists[:, has_pass].mean(1), schedule.bubble_fraction, atol=1e-12)
  chunks = stages * virtual_stages
  work = group_work(schedule)
  ticks = {name: {m: tick for tick, group in found.items() for m in group} for name, found in work.items()}
  assert all(sorted(of_microbatch) == list(range(microbatches)) for of_microbatch in ticks.values())
  forward, backward = done["forward"], done["backward"]
  assert forward.keys() == backward.keys() == {(m, c) for m in range(microbatches) for c in range(chunks)}
  for m in range(microbatches):
    passes = [forward[m, c] for c in range(chunks)] + [backward[m, c] for c in reversed(range(chunks))]
    # In a tick, the embedding comes before the forward pass, that before the loss, and that before the backward pass.
    assert ticks["embed forward"][m] <= passes[0] and passes[chunks - 1] <= ticks["loss"][m] <= passes[chunks]
    assert passes[-1] < ticks["embed backward"][m] < schedule.ticks
    assert all(np.diff(passes[:chunks]) >= 1) and all(np.diff(passes[chunks:]) >= 1)


def test_the_program_does_what_the_schedule_says(monkeypatch):
  """Runs a pipeline whose functions report the tick, their stage and what they are called for."""
  stages, virtual_stages, microbatches = 2, 2, 4
  schedule, calls, now = Schedule(stages, virtual_stages, microbatches), set(), {}

  def report(*call):
    calls.add((call[0], *map(int, call[1:])))

  def in_tick(self, tick, carry, run=pipeline.StageProgram.tick):
    now["tick"] = tick
    return run(self, tick, carry)

  def report_chunks(name, method):
    run = getattr(pipeline.StageProgram, method)

    def pass_with_report(self, tick, carry):
      def chunk_fn(params, virtual_stage, microbatch, x):
        jax.debug.callback(report, name, now["tick"], self.stage, microbatch, virtual_stage)
        return self.chunk_fn(params, virtual_stage, microbatch, x)

      return run(dataclasses.replace(self, chunk_fn=chunk_fn), tick, carry)

    monkeypatch.setattr(pipeline.StageProgram, method, pass_with_report)

  def report_group(name, method):
    run = getattr(pipeline.StageProgram, method)

    def work_with_report(self, microbatch, exists, carry):
      jax.debug.callback(report, name, now["tick"], self.stage, microbatch)
      return run(self, microbatch, exists, carry)

    monkeypatch.setattr(pipeline.StageProgram, method, work_with_report)

  def device(outer, layers):
    return pipeline.interleaved_1f1b(
      lambda outer, microbatch: (outer * (1.0 + microbatch), 0 * outer, ()),
      lambda layers, virtual_stage, microbatch, x: (x * layers[0], 0 * x, ()),
      lambda outer, microbatch, y: (y, ()),
      pvary(outer), pvary(layers), jnp.int32(microbatches), axis="stage", virtual_stages=virtual_stages,
    )[0][None]  # fmt: skip

  monkeypatch.setattr(pipeline.StageProgram, "tick", in_tick)
  report_chunks("forward", "chunk_forward")
  report_chunks("backward", "chunk_backward")
  for name, method in (
    ("embed forward", "embed_forward"),
    ("embed backward", "embed_backward"),
    ("loss", "loss_forward_backward"),
  ):
    report_group(name, method)
  mesh = jax.make_mesh((stages,), ("stage",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:stages])
  with jax.set_mesh(mesh):
    function = jax.jit(jax.shard_map(device, in_specs=jax.P(), out_specs=jax.P("stage")))
    jax.block_until_ready(function(1.0, jnp.ones((virtual_stages, 1))))
    jax.effects_barrier()

  said = {
    (name, tick, stage, microbatch)
    for name, found in group_work(schedule).items()
    for tick, group in found.items()
    for stage, microbatch in enumerate(group)
  }
  for name, items in zip(("forward", "backward"), work_items(schedule), strict=True):
    said |= {
      (name, tick, stage, *(int(a[stage, tick]) for a in (items.microbatch, items.virtual_stage)))
      for stage, tick in np.argwhere(items.exists).tolist()
    }
  bubbles = calls - said
  assert said <= calls and len(said) == 2 * stages * virtual_stages * microbatches + 3 * microbatches
  # Stages compute on stale values in a bubble, and nothing else that was not said.
  assert {name for name, *_ in bubbles} == {"forward", "backward"}
  assert {(tick, stage) for name, tick, stage, *_ in bubbles if name == "forward"} == {(0, 1), (8, 0)}
  assert {(tick, stage) for name, tick, stage, *_ in bubbles if name == "backward"} == {(4, 0), (12, 1)}
