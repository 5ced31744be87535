"""Every layout is the computation of one device: the loss, every gradient, the parameters and the experts that are chosen."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from deepseek_jax.config import (
  BalanceConfig,
  Config,
  DataConfig,
  MeshConfig,
  OptimizerConfig,
  ParallelConfig,
  TrainConfig,
)
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.transformer import graphdef
from deepseek_jax.model_config import AttentionConfig, ModelConfig, MoEConfig
from deepseek_jax.sharding import spec
from deepseek_jax.training.state import new_state
from deepseek_jax.training.step import make_train_step

SEQ, BATCH, MICROBATCHES = 16, 16, 2
GRADIENTS = OptimizerConfig(beta1=0.0, clip=1e9)  # so that Adam's first moment is the gradient
DENSE = Config(
  model=ModelConfig(
    vocab=64, embed=32, layers=4, mlp=48, init_std=0.1, compute_dtype="float32",
    attention=AttentionConfig(heads=8, kv_heads=4, head_dim=8),
  ),
  data=DataConfig(seq=SEQ, tokenizer="tokenizer.json"),
  train=TrainConfig(global_batch=BATCH, microbatch=BATCH // MICROBATCHES, loss_chunk=5),
  mesh=MeshConfig(data=1),
  optimizer=GRADIENTS,
)  # fmt: skip
# V3 in small: latent attention, a dense layer, groups of experts with a bias, every balance loss, multi-token prediction.
V3 = dataclasses.replace(
  DENSE,
  model=dataclasses.replace(
    DENSE.model, layers=5, first_dense_layers=1, num_mtp_layers=1,
    attention=AttentionConfig(
      kind="mla", heads=8, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6
    ),
    moe=MoEConfig(
      num_routed_experts=8, num_shared_experts=1, num_experts_per_token=3, mlp=16, score="sigmoid", num_expert_groups=4,
      topk_groups=2, group_score="top2_sum", router_bias=True, norm_topk_prob=True, route_scale=2.5,
    ),
  ),
  balance=BalanceConfig(
    expert_loss=0.01, device_loss=0.02, communication_loss=0.03, router_z_loss=0.001, bias_speed=0.01
  ),
)  # fmt: skip
CONFIGS = {"dense": DENSE, "v3": V3}


def float64(config):
  model = dataclasses.replace(config.model, param_dtype="float64", compute_dtype="float64")
  return dataclasses.replace(config, model=model, optimizer=dataclasses.replace(GRADIENTS, moments_dtype="float64"))


def tokens(step):
  ids = np.random.default_rng(step).integers(0, 64, (BATCH, SEQ + 1)).astype(np.int32)
  return ids.reshape(MICROBATCHES, -1, SEQ + 1)


def train(config, steps):
  """([gradients of each step], [metrics of each step], last state) of `steps` updates on the mesh of `config`."""
  sizes = dataclasses.astuple(config.mesh)
  mesh = make_mesh(config.mesh, jax.devices()[: int(np.prod(sizes))])
  dtype = config.model.param_dtype
  rates = {"learning_rate": np.asarray(1e-2, dtype), "mtp_weight": np.asarray(0.3, dtype)}
  rates |= {"bias_speed": np.asarray(1e-2, dtype)}
  found, reported = [], []
  with jax.set_mesh(mesh):
    # Blocks here and on every step: with fewer cores than virtual devices, programs in flight starve a collective.
    state = jax.block_until_ready(jax.jit(new_state, static_argnums=0)(config, jax.random.key(config.seed)))
    step = jax.jit(make_train_step(config, graphdef(config.model), bos=0), static_argnums=2)
    for i in range(steps):
      batch = jax.device_put(tokens(i), NamedSharding(mesh, spec(None, "batch", None)))
      state, metrics = jax.block_until_ready(step(state, batch, MICROBATCHES, rates))
      found.append(jax.device_get(state.opt_state[1].mu))
      reported.append(jax.device_get(metrics))
    return found, reported, jax.device_get(state)


@functools.cache
def one_device(config, steps):
  with jax.enable_x64(config.model.param_dtype == "float64"):
    return train(config, steps)


def changed(config, mesh, offload=False, kind="gather", **parallel):
  """`config` on a mesh, with fields of its section parallel, what waits in host memory, and how keys travel."""
  attention = dataclasses.replace(config.model.attention, context=kind)
  model = dataclasses.replace(config.model, attention=attention, remat="offload" if offload else config.model.remat)
  return dataclasses.replace(
    config, model=model, mesh=MeshConfig(**{"data": 1, **mesh}), parallel=ParallelConfig(**parallel),
    optimizer=dataclasses.replace(config.optimizer, offload=offload),
  )  # fmt: skip


def assert_equal(config, mesh, parallel, steps=3, tolerance=1e-10):
  """Training of `config` on the mesh is that on one device, up to `tolerance` relative to the largest of each array."""
  expected = one_device(config, steps)
  config = changed(config, mesh, **parallel)
  with jax.enable_x64(config.model.param_dtype == "float64"):
    ours = train(config, steps)
  for a, b in zip(ours[1], expected[1], strict=True):
    for name in ("loss", "total_loss", "grad_norm", *(("mtp_loss", "balance_loss") if config is V3 else ())):
      np.testing.assert_allclose(a[name], b[name], rtol=tolerance)
    # The same experts were chosen: the loads, and so the biases, are equal to the last choice.
    jax.tree.map(np.testing.assert_array_equal, a["load"], b["load"])
    assert a.get("overflow", 0) == 0
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(expected[0])]
  worst = {
    path: np.abs(a - b).max() / np.abs(b).max()
    for path, a, b in zip(paths, jax.tree.leaves(ours[0]), jax.tree.leaves(expected[0]), strict=True)
  }
  assert not {path: error for path, error in worst.items() if not error < tolerance}
  jax.tree.map(np.testing.assert_array_equal, ours[2].buffers, expected[2].buffers)
  for a, b in zip(jax.tree.leaves(ours[2].params), jax.tree.leaves(expected[2].params), strict=True):
    assert np.abs(a - b).max() / np.abs(b).max() < tolerance


FOUR = [
  ("dense", dict(data=4), {}),
  ("dense", dict(fsdp=4), {}),
  ("dense", dict(data=2, fsdp=2), dict(zero=1)),
  ("dense", dict(tensor=4), {}),
  ("v3", dict(data=2, fsdp=2), dict(zero=2)),
  ("v3", dict(expert=4), {}),
  ("v3", dict(fsdp=2, expert=2), dict(zero=1)),
  ("v3", dict(expert=2, tensor=2), {}),
  ("v3", dict(tensor=4), dict(latent="sharded")),
  ("dense", dict(context=4), {}),
  ("v3", dict(fsdp=2, context=2), dict(offload=True)),
  ("dense", dict(stage=4), {}),
  ("dense", dict(stage=2, fsdp=2), dict(circuits=2)),
  ("v3", dict(stage=2, expert=2), dict(zero=1)),
  ("v3", dict(stage=2, fsdp=2), dict(stage_layers=(3, 1))),
  ("v3", dict(context=2, expert=2), {}),
]


def name(case):
  model, mesh, parallel = case
  return "-".join([model, *(f"{key}={value}" for key, value in (mesh | parallel).items())])


@pytest.mark.parametrize("case", FOUR, ids=name)
def test_three_steps_in_float64_equal_one_device(case):
  model, mesh, parallel = case
  assert_equal(float64(CONFIGS[model]), mesh, parallel)
