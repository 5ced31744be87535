"""Every layout is the computation of one device: the loss, every gradient, the parameters and the chosen experts."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from deepseek_jax.config_sections import BalanceConfig
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.transformer import graphdef
from deepseek_jax.sharding import spec
from deepseek_jax.training.schedule import StepInputs
from deepseek_jax.training.step import make_eval_step, make_train_step
from deepseek_jax.training.step_config import StepConfig
from tests.configs import float64, with_moe
from tests.meshes import CONFIGS, DENSE, MICROBATCHES, V3, assert_equal, changed, name, one_device, tokens, train
from tests.steps import make_state

# The changes to parallel that go with a mesh, and what `changed` takes beside them.
FOUR = [
  ("dense", dict(data=4), {}),
  ("dense", dict(fsdp=4), {}),
  ("dense", dict(tensor=4), {}),
  ("dense", dict(context=4), dict(kind="ring")),
  ("dense", dict(stage=4), {}),  # two microbatches: the group of four is not full
  ("dense", dict(data=2, fsdp=2), dict(zero=2)),
  ("dense", dict(stage=2, fsdp=2), dict(virtual_stages=2, stage_layers=(1, 2, 1, 0))),
  ("mtp", dict(stage=2, context=2), {}),
  ("window", dict(stage=2, tensor=2), {}),
  ("moe", dict(expert=4), {}),
  ("moe", dict(fsdp=2, expert=2), dict(zero=1)),
  ("moe", dict(expert=2, tensor=2), dict(mla_latent="sharded")),
  ("moe", dict(context=2, expert=2), dict(offload=True)),
  ("moe", dict(stage=2, expert=2), dict(zero=1)),
  ("hash", dict(stage=2, context=2), {}),
]
EIGHT = [
  ("dense", dict(data=8), dict(zero=1)),
  ("dense", dict(fsdp=8), {}),
  ("dense", dict(tensor=4, fsdp=2), dict(zero=1)),
  ("dense", dict(data=2, fsdp=2, tensor=2), dict(zero=2)),
  ("dense", dict(stage=4, tensor=2), {}),
  ("dense", dict(stage=4, data=2), dict(zero=1, stage_layers=(2, 1, 1, 0))),
  ("dense", dict(stage=2, fsdp=2, tensor=2), dict(virtual_stages=2)),
  ("dense", dict(context=4, tensor=2), {}),
  ("dense", dict(context=2, stage=2, data=2), dict(kind="ring")),
  ("v3", dict(expert=8), {}),
  ("v3", dict(expert=8), dict(zero=1)),
  ("v3", dict(data=2, expert=4), dict(zero=1)),
  ("v3", dict(data=2, fsdp=2, expert=2), {}),
  ("v3", dict(data=2, fsdp=2, expert=2), dict(zero=2)),
  ("v3", dict(fsdp=2, expert=2, tensor=2), dict(mla_latent="sharded")),
  ("v3", dict(context=2, expert=2, tensor=2), dict(kind="ring")),
  ("v3", dict(context=4, expert=2), dict(zero=1)),
  ("v3", dict(context=2, tensor=4), dict(mla_latent="sharded", kind="ring")),
  ("v3", dict(stage=4, expert=2), dict(zero=1)),
  ("v3", dict(stage=2, expert=4), {}),
  ("v3", dict(stage=2, expert=2, data=2), dict(zero=1, virtual_stages=2)),
  ("v3", dict(stage=2, expert=2, tensor=2), dict(mla_latent="sharded")),
  ("v3", dict(stage=2, context=2, expert=2), dict(offload=True)),
]


# The layouts that the newest jax is tried with as well: between them every kind of collective.
SAMPLE = FOUR[5], FOUR[7], FOUR[11], FOUR[12]


@pytest.mark.parametrize(
  "case", [pytest.param(c, marks=pytest.mark.jax_version if c in SAMPLE else ()) for c in FOUR], ids=name
)
def test_three_steps_in_float64_equal_one_device(case):
  model, mesh, parallel = case
  assert_equal(float64(CONFIGS[model]), mesh, parallel)


@pytest.mark.meshes
@pytest.mark.parametrize("case", EIGHT, ids=name)
def test_eight_devices_equal_one(case):
  model, mesh, parallel = case
  assert_equal(float64(CONFIGS[model]), mesh, parallel, born=True)


@pytest.mark.parametrize("case", [FOUR[1], ("moe", dict(expert=2, tensor=2), {})], ids=name)
def test_the_first_step_in_float32_equals_one_device(case):
  """Later ones need float64: where two experts nearly tie, rounding chooses, and the bias follows the choice."""
  model, mesh, parallel = case
  config = CONFIGS[model]
  ours, expected = train(changed(config, mesh, **parallel), 1), one_device(config, 1)
  for loss in ("loss", "total_loss"):
    assert abs(ours[1][0][loss] - expected[1][0][loss]) < 5e-6
  for a, b in zip(jax.tree.leaves(ours[0]), jax.tree.leaves(expected[0]), strict=True):
    assert np.abs(a - b).max() / np.abs(b).max() < 1e-5


def test_ten_steps_in_float32_of_a_dense_model_equal_one_device():
  ours, expected = train(changed(DENSE, dict(fsdp=2, tensor=2)), 10), one_device(DENSE, 10)
  for a, b in zip(ours[1], expected[1], strict=True):
    assert abs(a["loss"] - b["loss"]) < 5e-6


def test_choices_without_room_skip_the_step_and_say_so():
  """A router that sends every token to the same three experts, the first device's and the second's."""
  balance = BalanceConfig(bias_update_rate=0.01)
  model = with_moe(V3.model, buffer_factor=1.0, num_expert_groups=1, topk_groups=1)
  model = dataclasses.replace(model, layers=2, num_mtp_layers=0)
  config = dataclasses.replace(V3, model=model, balance=balance)
  config = changed(config, dict(expert=4))
  with jax.set_mesh(make_mesh(config.mesh)) as _:
    mesh = make_mesh(config.mesh)
    state = make_state(config, mesh)
    state = dataclasses.replace(state, buffers=jax.tree.map(lambda b: b.at[..., :3].set(9.0), state.buffers))
    step = jax.jit(make_train_step(StepConfig.of(config, bos=0), graphdef(config.model)), static_argnums=2)
    batch = jax.device_put(tokens(0), NamedSharding(mesh, spec(None, "batch", None)))
    rates = StepInputs(0.01, 0.01, 0.01).as_arrays("float32")
    after, metrics = jax.block_until_ready(step(state, batch, MICROBATCHES, rates))
    losses = jax.jit(make_eval_step(StepConfig.of(config, bos=0), graphdef(config.model)))(
      state.params, state.buffers, batch[0]
    )
  assert int(metrics["overflow"]) > 0 and np.isfinite(metrics["grad_norm"])
  assert int(after.skipped["total"]) == 1 and np.isnan(losses).all()
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(after.params), jax.device_get(state.params))
