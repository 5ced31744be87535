"""FP8 training: near the losses of full precision, and the same on a mesh that does not change the tiles."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from deepseek_jax.config_sections import MeshConfig
from deepseek_jax.errors import ConfigError
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.transformer import graphdef
from deepseek_jax.model_config import AttentionConfig, Fp8Config, MoEConfig
from deepseek_jax.sharding import spec
from deepseek_jax.training.schedule import StepInputs
from deepseek_jax.training.step import abstract_step
from tests import configs
from tests.configs import make_config
from tests.steps import make_state, make_step_with_grads

SEQ, BATCH = 64, 8
# On a mesh of fsdp=2 and tensor=2 a device has 256 rows, and 128 of the columns that two share.
MODEL = dataclasses.replace(
  configs.DENSE, embed=128, layers=1, mlp=256, init_std=0.04, precision="fp8", remat="none",
  attention=AttentionConfig(heads=8, kv_heads=8, head_dim=32),
)  # fmt: skip
DENSE = make_config(MODEL, SEQ, BATCH)
MOE = dataclasses.replace(
  DENSE.model, moe=MoEConfig(num_routed_experts=4, num_shared_experts=1, num_experts_per_token=2, mlp=64)
)


def train(config, steps):
  """([gradients of each step], [loss of each step]) of `steps` updates with one batch, on the mesh of `config`."""
  mesh = make_mesh(config.mesh, jax.devices()[: int(np.prod(dataclasses.astuple(config.mesh)))])
  ids = np.random.default_rng(0).integers(0, 64, (1, BATCH, SEQ + 1)).astype(np.int32)
  rates = StepInputs(learning_rate=3e-4, mtp_weight=0.3).as_arrays("float32")
  gradients, losses = [], []
  with jax.set_mesh(mesh):
    state = make_state(config, mesh)
    step = jax.jit(make_step_with_grads(config), static_argnums=2)
    batch = jax.device_put(ids, NamedSharding(mesh, spec(None, "batch", None)))
    for _ in range(steps):
      state, metrics, grads = jax.block_until_ready(step(state, batch, 1, rates))
      gradients.append(jax.device_get(grads))
      losses.append(float(metrics["loss"]))
  return gradients, losses


def errors(ours, reference):
  """Of each array, relative in the Frobenius norm."""
  return {
    jax.tree_util.keystr(path): np.linalg.norm(a - b) / np.linalg.norm(b)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(reference), strict=True)
  }


def test_losses_fall_as_in_full_precision_and_gradients_are_float32():
  gradients, losses = train(dataclasses.replace(DENSE, model=MOE), 3)
  exact_gradients, exact = train(dataclasses.replace(DENSE, model=dataclasses.replace(MOE, precision="bf16")), 3)
  assert losses[-1] < losses[0] - 0.1
  np.testing.assert_allclose(losses, exact, rtol=2.5e-3)
  assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(gradients))
  found = errors(gradients[0], exact_gradients[0])
  assert all(0.005 < error < 0.3 for error in found.values()), found


def test_a_mesh_that_leaves_the_tiles_alone_changes_nothing():
  """But a value here and there that another order of a sum moves to the other side of an FP8 rounding."""
  gradients, losses = train(dataclasses.replace(DENSE, mesh=MeshConfig(data=1, fsdp=2, tensor=2)), 1)
  expected_gradients, expected = train(DENSE, 1)
  np.testing.assert_allclose(losses, expected, rtol=1e-6)
  found = errors(gradients[0], expected_gradients[0])
  assert max(found.values()) < 1e-3 and np.median(list(found.values())) < 1e-5, found


def compiled(config):
  """HLO of a step of `config`."""
  mesh = make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    step, arguments = abstract_step(config, mesh)
    return jax.jit(step).lower(*arguments).compile().as_text()


def test_tokens_travel_to_experts_in_half_the_bytes_and_come_back_as_they_are():
  model = dataclasses.replace(MOE, compute_dtype="bfloat16", moe=dataclasses.replace(MOE.moe, num_experts_per_token=1))
  config = dataclasses.replace(DENSE, model=model, mesh=MeshConfig(data=1, expert=4))
  sent = {}
  for precision in ("fp8", "bf16"):
    text = compiled(dataclasses.replace(config, model=dataclasses.replace(model, precision=precision)))
    found = re.findall(r"= \((\w+)\[1,128,(\d+)\].* all-to-all\(", text)
    sent[precision] = sorted((dtype, int(width)) for dtype, width in found)
  # To the experts, with a weight and a choice each; back, and backward again. The compiler for CPUs sends bfloat16 as
  # float32; `make tpu` reads what TPUs send.
  assert sent["bf16"] == [("f32", 2)] * 2 + [("f32", 128)] * 4
  # Scales travel with the facts, and those of gradients alone.
  assert sent["fp8"] == [("f32", 1), ("f32", 2), ("f32", 3)] + [("f32", 128)] * 2 + [("u8", 128)] * 2


def test_powers_of_two_travel_to_experts_without_another_rounding():
  config = dataclasses.replace(
    DENSE, model=dataclasses.replace(MOE, fp8=Fp8Config(pow2_scales=True)), mesh=MeshConfig(data=1, expert=2)
  )
  alone = dataclasses.replace(config, mesh=MeshConfig(data=1))
  (gradients, losses), (expected_gradients, expected) = train(config, 1), train(alone, 1)
  np.testing.assert_allclose(losses, expected, rtol=1e-6)
  # Tiles of gradients of weights are along rows, which each device has others of: roundings, not the dispatch.
  found = errors(gradients[0], expected_gradients[0])
  assert max(found.values()) < 0.1, found


def test_remat_dots_keeps_the_fp8_products_of_layers():
  """Without them the backward pass multiplies again, but for a layer's last product, which it does not read."""

  def products(remat):
    config = dataclasses.replace(DENSE, model=dataclasses.replace(DENSE.model, remat=remat))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
      step, arguments = abstract_step(config, mesh)
      text = str(jax.make_jaxpr(step)(*arguments))
    return len(re.findall(r"= dot_general\[", text))

  weights = 4 + 3  # of attention and the SwiGLU
  assert products("full") - products("dots") == weights - 1


@pytest.mark.parametrize("section", ["fp8", "attention"])
def test_kernels_that_these_devices_do_not_have_are_refused_at_the_door(section):
  named = dataclasses.replace(getattr(DENSE.model, section), implementation="pallas")
  config = dataclasses.replace(DENSE.model, **{section: named})
  with jax.set_mesh(make_mesh(DENSE.mesh, jax.devices()[:1])):
    with pytest.raises(ConfigError, match=f"model.{section}.implementation=pallas: .* for cpu: use auto or xla"):
      graphdef(config)
