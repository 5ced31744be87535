"""One update: the same on every mesh, the same in microbatches, harmless where gradients are not finite."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from deepseek_jax.config_sections import MeshConfig
from deepseek_jax.kernels.implementations import NO_REPLACEMENTS, Replacements, replace_kernels
from deepseek_jax.mesh import abstract_mesh, make_mesh
from deepseek_jax.model.transformer import graphdef
from deepseek_jax.plan.count import count_operations
from deepseek_jax.plan.flops import TRACE_DEVICE
from deepseek_jax.sharding import spec
from deepseek_jax.training.objective import document_positions
from deepseek_jax.training.schedule import StepInputs
from deepseek_jax.training.state import abstract_state, init_state, state_sha256
from deepseek_jax.training.step import jit_train_step, make_train_step
from deepseek_jax.training.step_config import StepConfig
from tests import configs
from tests.configs import float64, make_config, with_model, with_moe
from tests.steps import make_state, make_step_with_grads

pytestmark = pytest.mark.jax_version

SEQ = 24
CONFIG, V3 = (make_config(model, SEQ, global_batch=8, loss_chunk=7) for model in (configs.DENSE, configs.V3))
V3 = with_model(V3, layers=2, first_dense_layers=0)  # one stack less to compile
CONFIGS = {"dense": CONFIG, "moe": with_model(V3, num_mtp_layers=0), "mtp": with_model(CONFIG, num_mtp_layers=1)}
MESHES = {
  "data=2 x tensor=2": MeshConfig(data=2, tensor=2),
  "fsdp=2 x tensor=2": MeshConfig(data=1, fsdp=2, tensor=2),
}


def tokens(step, microbatches=1, batch=8):
  ids = np.random.default_rng(step).integers(0, 64, (batch, SEQ + 1)).astype(np.int32)
  return ids.reshape(microbatches, batch // microbatches, SEQ + 1)


def rates(learning_rate, dtype, mtp_weight=0.3, bias_update_rate=1e-3):
  return StepInputs(learning_rate, mtp_weight, bias_update_rate).as_arrays(dtype)


def train(config, mesh_config=None, steps=1, microbatches=1, rate=1e-2, dynamic=False, batches=tokens):
  """(state, [metrics of each step, with its gradients as "grads"]) after `steps` updates."""
  mesh_config = mesh_config or MeshConfig(data=1)
  sizes = [s for s in dataclasses.astuple(mesh_config)]
  mesh = make_mesh(mesh_config, jax.devices()[: int(np.prod(sizes))])
  with jax.set_mesh(mesh):
    # Blocks here and on every step: with fewer cores than virtual devices, programs in flight starve a collective.
    state = make_state(config, mesh)
    step = jax.jit(
      make_step_with_grads(config), donate_argnames="state", static_argnames=() if dynamic else ("microbatches",)
    )
    seen = []
    for i in range(steps):
      batch = jax.device_put(batches(i, microbatches), NamedSharding(mesh, spec(None, "batch", None)))
      state, metrics, grads = step(state, batch, microbatches, rates(rate, config.model.param_dtype))
      seen.append(jax.device_get(jax.block_until_ready((state, metrics | {"grads": grads}))[1]))
    return jax.device_get(state), seen


@functools.cache
def one_device(config, steps):
  with jax.enable_x64(config.model.param_dtype == "float64"):
    return train(config, steps=steps)


def test_the_step_balances_and_predicts_two_tokens_ahead():
  with jax.enable_x64(True):
    state, seen = train(float64(with_model(V3, num_mtp_layers=2)), steps=4)
  choices = 8 * SEQ * 3
  assert (seen[0]["load"]["moe_layers"].sum(-1) == choices).all() and seen[0]["load"]["moe_layers"].shape == (2, 8)
  assert seen[0]["load"]["mtp_layers"].sum(-1).tolist() == [8 * (SEQ - 1) * 3, 8 * (SEQ - 2) * 3]
  assert seen[0]["mtp_loss"].shape == (2,) and np.abs(seen[0]["mtp_loss"] - np.log(64)).max() < 0.3
  first = seen[0]
  assert first["total_loss"] == pytest.approx(first["loss"] + 0.3 * first["mtp_loss"].mean() + first["balance_loss"])
  bias = state.buffers["moe_layers"]["moe"]["router"]["bias"]
  steps = np.sum([np.sign(m["load"]["moe_layers"].mean(-1, keepdims=True) - m["load"]["moe_layers"]) for m in seen], 0)
  np.testing.assert_allclose(bias, 1e-3 * steps, rtol=1e-12)


def test_capacity_for_all_equals_the_dropless_dispatch():
  config = CONFIGS["moe"]
  _, [expected] = one_device(config, 1)
  _, [ours] = train(dataclasses.replace(config, model=with_moe(config.model, dispatch="capacity", capacity_factor=8.0)))
  assert ours["total_loss"] == pytest.approx(expected["total_loss"], abs=5e-6)
  assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-6)


def test_other_kernels_and_another_mesh_make_another_program_of_an_equal_config():
  """Equal configs share a step: what it was traced for first must not stay."""
  attention = dataclasses.replace(configs.GQA, heads=2, kv_heads=2, head_dim=128)
  config = make_config(dataclasses.replace(configs.DENSE, compute_dtype="bfloat16", attention=attention), 128, 2)

  def program(replacements, **sizes):
    mesh = abstract_mesh(MeshConfig(**{"data": 1, **sizes}), TRACE_DEVICE)
    step_config = StepConfig.of(dataclasses.replace(config), bos=0)
    with jax.sharding.use_abstract_mesh(mesh), replace_kernels(replacements):
      batch = jax.ShapeDtypeStruct((1, 2, 129), "int32", sharding=NamedSharding(mesh, spec(None, "batch", None)))
      step = jit_train_step(step_config, graphdef(config.model), replacements, static_microbatches=True)
      traced = step.trace(abstract_state(step_config, mesh), batch, 1, StepInputs.abstract("float32"))
    return step, {operation.kind for operation in count_operations(traced.jaxpr, mesh.shape)}

  first, kinds = program(NO_REPLACEMENTS)
  assert "fused attention" in kinds and "reduce-scatter" not in kinds
  assert "fused attention" not in program(Replacements(frozenset({"attention.attention"})))[1]
  assert {"fused attention", "reduce-scatter"} <= program(NO_REPLACEMENTS, fsdp=2)[1]
  assert program(NO_REPLACEMENTS) == (first, kinds)


def test_state_is_born_in_the_layout_that_abstract_state_says():
  mesh = make_mesh(MESHES["fsdp=2 x tensor=2"])
  with jax.set_mesh(mesh):
    abstract = abstract_state(StepConfig.of(CONFIG, bos=0), mesh)
    state = jax.jit(init_state, static_argnums=0)(StepConfig.of(CONFIG, bos=0), jax.random.key(0))
  jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(f"{a} {b}"), abstract, state)
  assert all(
    jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), abstract, state))
  )
  kernel = state.params["dense_layers"]["mlp"]["up"]["kernel"]
  moment = state.opt_state[1].mu["dense_layers"]["mlp"]["up"]["kernel"]
  assert kernel.addressable_shards[0].data.size * 4 == kernel.size
  assert moment.sharding == kernel.sharding


@pytest.mark.parametrize(("model", "dynamic"), [("dense", False), ("mtp", True), ("moe", True)])
def test_microbatches_equal_the_large_batch(model, dynamic):
  large, [expected] = one_device(CONFIGS[model], 1)
  state, [ours] = train(CONFIGS[model], microbatches=4, dynamic=dynamic)
  assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-6)
  assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)
  jax.tree.map(np.testing.assert_array_equal, state.buffers, large.buffers)
  for a, b in zip(jax.tree.leaves(ours["grads"]), jax.tree.leaves(expected["grads"]), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)


def test_a_ramp_uses_the_first_microbatches_only_and_no_other_program():
  config = make_config(CONFIG.model, SEQ, global_batch=8, microbatch=2, loss_chunk=7)
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  with jax.set_mesh(mesh):
    step = jax.jit(make_train_step(StepConfig.of(config, bos=0), graphdef(config.model)))
    state = make_state(config, mesh)
    batch = tokens(0, 4)
    _, two = step(state, batch, 2, rates(1e-2, np.float32))
    batch[2:] = 0  # what does not count may be anything
    _, same = step(state, batch, 2, rates(1e-2, np.float32))
    _, four = step(state, batch, 4, rates(1e-2, np.float32))
    assert step._cache_size() == 1
  assert two["loss"] == same["loss"] != four["loss"]
  _, [half] = train(config, batches=lambda i, n: tokens(0)[:, :4])
  assert two["loss"] == pytest.approx(half["loss"], rel=1e-6)


def test_one_sequence_on_a_tensor_mesh():
  """A batch of size 1 with as many key heads as query heads: reshapes among dimensions of size 1 keep their layout."""
  attention = dataclasses.replace(CONFIG.model.attention, kv_heads=8)
  config = with_model(CONFIG, attention=attention)
  _, [ours] = train(config, MeshConfig(data=1, tensor=4), batches=lambda i, n: tokens(0)[:, :1])
  _, [expected] = train(config, batches=lambda i, n: tokens(0)[:, :1])
  assert abs(ours["loss"] - expected["loss"]) < 5e-6


def test_training_learns():
  _, seen = train(CONFIG, steps=30, rate=1e-2, batches=lambda i, n: tokens(0))
  assert seen[-1]["loss"] < 0.5 * seen[0]["loss"]


def test_non_finite_gradients_skip_the_update_and_are_counted():
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  with jax.set_mesh(mesh):
    step = jax.jit(
      make_train_step(StepConfig.of(CONFIG, bos=0), graphdef(CONFIG.model)), static_argnames="microbatches"
    )
    state = make_state(CONFIG, mesh)
    state, _ = step(state, tokens(0), 1, rates(1e-2, np.float32))
    poisoned = jax.tree.map(lambda x: x, state)
    poisoned.params["final_norm"]["scale"] = jnp.full_like(state.params["final_norm"]["scale"], jnp.inf)
    after, metrics = step(poisoned, tokens(1), 1, rates(1e-2, np.float32))
    again, _ = step(after, tokens(1), 1, rates(1e-2, np.float32))
    healed = dataclasses.replace(again, params=state.params)
    fine, _ = step(healed, tokens(2), 1, rates(1e-2, np.float32))
  assert not np.isfinite(metrics["grad_norm"])
  assert state_sha256((after.params, after.opt_state)) == state_sha256((poisoned.params, poisoned.opt_state))
  assert (int(after.step), int(again.step)) == (2, 3)
  assert {k: int(v) for k, v in again.skipped.items()} == {"total": 2, "in_a_row": 2}
  assert {k: int(v) for k, v in fine.skipped.items()} == {"total": 2, "in_a_row": 0}


def test_dropout_is_repeatable_and_the_same_on_every_mesh():
  config = with_model(CONFIG, dropout=0.2)
  _, [first] = train(config)
  _, [second] = train(config, MESHES["data=2 x tensor=2"])
  _, [without] = one_device(CONFIG, 1)
  assert abs(first["loss"] - second["loss"]) < 5e-6
  assert abs(first["loss"] - without["loss"]) > 1e-3
  _, [other_key] = train(dataclasses.replace(config, seed=1))
  assert other_key["loss"] != first["loss"]


def test_masked_documents_train_on_every_mesh():
  config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, mask_documents=True))
  _, [first] = train(config)
  _, [second] = train(config, MESHES["fsdp=2 x tensor=2"])
  _, [without] = one_device(CONFIG, 1)
  assert abs(first["loss"] - second["loss"]) < 5e-6 and abs(first["loss"] - without["loss"]) > 1e-4


def test_document_positions():
  ids = jnp.array([[5, 0, 5, 5, 0, 5], [0, 5, 5, 5, 5, 5]])
  segments, positions = document_positions(ids, bos=0)
  assert segments.tolist() == [[0, 1, 1, 1, 2, 2], [1] * 6]
  assert positions.tolist() == [[0, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("gathered_bytes", [1 << 30, 2000])
def test_state_hash_sees_every_bit_and_no_mesh(gathered_bytes, monkeypatch):
  monkeypatch.setattr("deepseek_jax.training.state.MAX_GATHERED_BYTES", gathered_bytes)
  hashes = []
  for mesh_config in (MeshConfig(data=1), MESHES["fsdp=2 x tensor=2"]):
    mesh = make_mesh(mesh_config, jax.devices()[: int(np.prod(dataclasses.astuple(mesh_config)))])
    with jax.set_mesh(mesh):
      state = jax.jit(init_state, static_argnums=0)(StepConfig.of(CONFIG, bos=0), jax.random.key(0))
    hashes.append(state_sha256(state))
  assert hashes[0] == hashes[1]
  host = jax.device_get(state)
  assert state_sha256(host) == hashes[0]
  for change in ("a bit", "a sign", "two elements", "two rows"):
    host.params["embed"] = embed = np.array(state.params["embed"])
    if change == "a bit":
      embed.view(np.uint32)[3, 4] ^= 1
    elif change == "a sign":
      embed[3, 4] *= -1
    elif change == "two elements":
      embed[3, 4], embed[4, 3] = embed[4, 3], embed[3, 4]
    else:
      embed[[3, 4]] = embed[[4, 3]]
    hashes.append(state_sha256(host))
  assert len(set(hashes)) == 5
