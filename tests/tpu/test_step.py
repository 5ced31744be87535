"""The whole update on meshes of 64 chips: it compiles, holds what it should, and says only what was written."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from deepseek_jax.config import Config, DataConfig, MeshConfig, TrainConfig
from deepseek_jax.model.transformer import graphdef
from deepseek_jax.model_config import AttentionConfig, ModelConfig, MoEConfig
from deepseek_jax.sharding import size_per_device, spec
from deepseek_jax.training.state import abstract_state
from deepseek_jax.training.step import make_train_step
from tests.tpu.compiled import compiled, pod

# V3's structure. Sorts of many tokens are most of what the compiler does, so they are few.
MODEL = ModelConfig(
  vocab=8192, embed=1024, layers=3, first_dense_layers=1, mlp=2048, remat="full",
  attention=AttentionConfig(
    kind="mla", heads=16, q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
  ),
  moe=MoEConfig(
    num_routed_experts=64, num_shared_experts=1, num_experts_per_token=8, mlp=512, score="sigmoid", num_expert_groups=8,
    topk_groups=4, group_score="top2_sum", router_bias=True, norm_topk_prob=True, route_scale=2.5,
  ),
)  # fmt: skip
MESHES = {
  "every_axis": dict(data=2, fsdp=2, expert=4, context=2, tensor=2),
  "stages": dict(stage=2, fsdp=4, expert=8),
}


def config_of(sizes):
  train = TrainConfig(global_batch=64, microbatch=32)
  return Config(model=MODEL, data=DataConfig(seq=256), mesh=MeshConfig(**({"data": 1} | sizes)), train=train)


def step_for(mesh, config):
  """(the update compiled for `mesh`, bytes of the state on one device)."""
  with jax.set_mesh(mesh):
    state, count = abstract_state(config, mesh), config.train.global_batch // config.train.microbatch
    shape = count, config.train.microbatch, config.data.seq + 1
    batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, spec(None, "batch", None)))
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, jax.P()))
    update = make_train_step(config, graphdef(config.model), bos=0)

    def step(state, batch, rates):
      return update(state, batch, count, rates)

    rates = dict.fromkeys(("learning_rate", "mtp_weight", "bias_speed"), rate)
    held = sum(size_per_device(a) * a.dtype.itemsize for a in jax.tree.leaves(state))
    return compiled(step, state, batch, rates, donate_argnums=0), held


@pytest.fixture(scope="module", params=MESHES)
def step(request):
  """About a minute each."""
  return *step_for(pod("v5p:4x4x4", **MESHES[request.param]), config_of(MESHES[request.param])), MESHES[request.param]


def test_collectives_are_those_written(step):
  program, _, _ = step
  print(dict(program.written), dict(program.collectives))
  assert program.collectives["ragged-all-to-all"] > 0
  assert not {name: count for name, count in program.collectives.items() if count > program.written[name]}


def test_no_layout_is_changed_through_whole_arrays(step):
  assert "nvoluntary full rematerialization" not in step[0].log


def test_the_state_is_updated_in_place(step):
  program, held, _ = step
  # Small arrays are padded to the tiles of the chip.
  assert held <= program.memory.alias_size_in_bytes <= 1.05 * held
  assert program.memory.argument_size_in_bytes <= 1.05 * held


def test_native_grouped_products(step):
  assert '"tpu_custom_call"' in step[0].hlo


def test_slices_exchange_gradients_once():
  """Between two slices, whatever the microbatches: one sum of the gradients, each device its part, and a few numbers."""
  sizes = dict(data=2, fsdp=4, expert=4, context=2, tensor=2)
  mesh, config = pod("v5p:4x4x4", slices=2, **sizes), config_of(sizes)
  program, _ = step_for(mesh, config)
  with jax.set_mesh(mesh):
    params = abstract_state(config, mesh).params
  every = sum(a.size for a in jax.tree.leaves(params)) * 4 / 64  # bytes, if all 64 devices of a slice carry equal parts
  assert {name for name, _ in program.between_slices} == {"ENTRY"}
  assert every <= sum(size for _, size in program.between_slices) <= 1.2 * every
