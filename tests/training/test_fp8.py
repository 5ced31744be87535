"""Training in eight bits: near the losses of full precision, and the same on a mesh that does not change the tiles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from deepseek_jax.config import Config, DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.transformer import graphdef
from deepseek_jax.model_config import AttentionConfig, ModelConfig, MoEConfig
from deepseek_jax.sharding import spec
from deepseek_jax.training.state import new_state
from deepseek_jax.training.step import make_train_step

SEQ, BATCH = 64, 8
# On four devices each has 128 rows, a tile, and of what two of them share 128 columns.
DENSE = Config(
  model=ModelConfig(
    vocab=64, embed=128, layers=1, mlp=256, init_std=0.04, compute_dtype="float32", precision="fp8",
    attention=AttentionConfig(heads=8, kv_heads=8, head_dim=32),
  ),
  data=DataConfig(seq=SEQ, tokenizer="tokenizer.json"),
  train=TrainConfig(global_batch=BATCH),
  optimizer=OptimizerConfig(beta1=0.0, clip=1e9),  # so that Adam's first moment is the gradient
)  # fmt: skip
V3 = dataclasses.replace(
  DENSE,
  model=dataclasses.replace(
    DENSE.model, layers=1,
    attention=AttentionConfig(
      kind="mla", heads=4, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
    ),
    moe=MoEConfig(
      num_routed_experts=4, num_shared_experts=1, num_experts_per_token=2, mlp=64, score="sigmoid", norm_topk_prob=True
    ),
  ),
)  # fmt: skip


def train(config, steps):
  """([gradients of each step], [loss of each step]) of `steps` updates with one batch, on the mesh of `config`."""
  mesh = make_mesh(config.mesh, jax.devices()[: int(np.prod(dataclasses.astuple(config.mesh)))])
  ids = np.random.default_rng(0).integers(0, 64, (1, BATCH, SEQ + 1)).astype(np.int32)
  rates = {"learning_rate": 1e-3, "mtp_weight": 0.3, "bias_speed": 0.0}
  rates = {name: np.float32(rate) for name, rate in rates.items()}
  gradients, losses = [], []
  with jax.set_mesh(mesh):
    state = jax.block_until_ready(jax.jit(new_state, static_argnums=0)(config, jax.random.key(0)))
    step = jax.jit(make_train_step(config, graphdef(config.model), bos=0), static_argnums=2)
    batch = jax.device_put(ids, NamedSharding(mesh, spec(None, "batch", None)))
    for _ in range(steps):
      state, metrics = jax.block_until_ready(step(state, batch, 1, rates))
      gradients.append(jax.device_get(state.opt_state[1].mu))
      losses.append(float(metrics["loss"]))
  return gradients, losses


@functools.cache
def one_device(config, steps):
  return train(dataclasses.replace(config, mesh=MeshConfig(data=1)), steps)


def with_model(config, **changes):
  return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def errors(ours, reference):
  """Of each array, relative in the Frobenius norm."""
  return {
    jax.tree_util.keystr(path): np.linalg.norm(a - b) / np.linalg.norm(b)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(reference), strict=True)
  }


@pytest.mark.parametrize("config", [DENSE, V3], ids=["dense", "v3"])
def test_losses_fall_as_in_full_precision_and_gradients_are_float32(config):
  gradients, losses = one_device(config, 3)
  exact_gradients, exact = one_device(with_model(config, precision="bf16"), 3)
  assert losses[-1] < losses[0] - 0.3
  np.testing.assert_allclose(losses, exact, rtol=2.5e-3)
  assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(gradients))
  found = errors(gradients[0], exact_gradients[0])
  assert all(0.005 < error < 0.3 for error in found.values()), found


@pytest.mark.parametrize("mesh", [dict(fsdp=4), dict(data=2, tensor=2)], ids=str)
def test_a_mesh_that_leaves_the_tiles_alone_changes_nothing(mesh):
  """But a value here and there that another order of a sum moves to the other side of a rounding in eight bits."""
  gradients, losses = train(dataclasses.replace(DENSE, mesh=MeshConfig(**{"data": 1, **mesh})), 1)
  expected_gradients, expected = one_device(DENSE, 3)
  np.testing.assert_allclose(losses, expected[:1], rtol=1e-6)
  found = errors(gradients[0], expected_gradients[0])
  assert max(found.values()) < 1e-3 and np.median(list(found.values())) < 1e-5, found
