"""The memory estimate against what XLA allocates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import Config
from deepseek_jax.config_sections import DataConfig, MeshConfig, OptimizerConfig, ParallelConfig, TrainConfig
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.transformer import graphdef
from deepseek_jax.plan.memory import COPIES, estimate_memory
from deepseek_jax.training.schedule import StepInputs
from deepseek_jax.training.state import init_state
from deepseek_jax.training.step import make_train_step
from deepseek_jax.training.step_config import StepConfig
from tests.plan.test_flops import SMALL, V3

RAGGED_MOE = dataclasses.replace(V3.moe, num_routed_experts=8, num_experts_per_token=2, dispatch="ragged")


@pytest.mark.parametrize(
  "model",
  [SMALL, dataclasses.replace(SMALL, remat="full"), dataclasses.replace(V3, moe=RAGGED_MOE, remat="full")],
  ids=["none", "full", "v3"],
)
def test_memory_estimate_is_near_what_xla_allocates(model):
  attention = dataclasses.replace(model.attention, implementation="xla")  # this is compiled for a CPU
  model = dataclasses.replace(model, layers=8, vocab=2048, attention=attention)
  config = Config(model=model, mesh=MeshConfig(data=1), train=TrainConfig(global_batch=8, loss_chunk=128))
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    step = jax.jit(
      make_train_step(StepConfig.of(config, bos=0), graphdef(model)),
      donate_argnames="state",
      static_argnames="microbatches",
    )
    state = jax.eval_shape(lambda: init_state(StepConfig.of(config, bos=0), jax.random.key(0)))
    batch = jax.ShapeDtypeStruct((1, 8, config.data.seq + 1), jnp.int32)
    rates = StepInputs.abstract("float32")
    xla = step.lower(state, batch, 1, rates).compile().memory_analysis()
  ours = estimate_memory(config)
  assert ours.params + ours.optimizer == pytest.approx(xla.argument_size_in_bytes, rel=0.01)
  assert 0.5 < (ours.total_bytes - ours.params - ours.optimizer) / xla.temp_size_in_bytes < 2
  assert np.isfinite(ours.total_bytes)


def test_zero_1_holds_gathered_weights_and_unsharded_gradients():
  """Whichever layout was traced first."""
  config = Config(model=SMALL, mesh=MeshConfig(data=1, fsdp=4), train=TrainConfig(global_batch=8))
  sharded, unsharded = (
    estimate_memory(dataclasses.replace(config, parallel=ParallelConfig(zero=zero))) for zero in (3, 1)
  )
  assert sharded.params == unsharded.params
  assert unsharded.gradients == pytest.approx(
    4 * sharded.gradients * COPIES["unsharded_gradients"] / COPIES["gradients"], rel=0.02
  )


def test_a_large_update_is_the_peak_where_the_passes_need_less():
  """Muon's, of all layers' square output projections at once: 3 x 4 bytes an element, and as much for their products."""
  model = dataclasses.replace(SMALL, layers=32, remat="full")

  def temporary_bytes(seq, **fields):
    train, optimizer = TrainConfig(global_batch=1), OptimizerConfig(**fields)
    config = Config(model=model, data=DataConfig(seq=seq), mesh=MeshConfig(data=1), train=train, optimizer=optimizer)
    ours = estimate_memory(config)
    return ours.total_bytes - ours.params - ours.optimizer

  trained, elements = ("*/attn/o/kernel",), model.layers * model.embed**2
  update = 4 * elements + 2 * 3 * 4 * elements
  assert temporary_bytes(16, kind="adamw", trainable=trained) < update
  assert temporary_bytes(16, kind="muon", trainable=trained) == update
  assert temporary_bytes(2048, kind="muon", trainable=trained) == temporary_bytes(2048, kind="adamw", trainable=trained)
