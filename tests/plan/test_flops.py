"""Parameter counts and FLOPs against the papers, every matmul of the traced program, and XLA's own analysis."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from deepseek_jax.config import Config
from deepseek_jax.config_sections import DataConfig, MeshConfig, TrainConfig
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import list_configs, load_config
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.transformer import graphdef, init_params
from deepseek_jax.model_config import AttentionConfig, ModelConfig, MoEConfig
from deepseek_jax.plan.flops import ParameterCounts, count_parameters, steps_for_flops, training_flops
from deepseek_jax.training.loss import cross_entropy
from tests import configs

SMALL = dataclasses.replace(
  configs.DENSE,
  vocab=512,
  embed=128,
  layers=1,
  mlp=256,
  remat="none",
  attention=AttentionConfig(heads=4, kv_heads=2, head_dim=32),
)
BATCH, SEQ = 2, 64


# Two depths of multi-token prediction; every token goes to all 4 experts, so that the dense dispatch does no idle work.
V3 = dataclasses.replace(
  SMALL, layers=3, first_dense_layers=1, num_mtp_layers=2,
  attention=dataclasses.replace(configs.MLA, heads=4, qk_nope_head_dim=24, v_head_dim=20),
  moe=MoEConfig(
    num_routed_experts=4, num_shared_experts=1, num_experts_per_token=4, mlp=48, score="sigmoid", router_bias=True,
    dispatch="dense",
  ),
)  # fmt: skip


@pytest.mark.parametrize(
  ("name", "total", "active", "mtp"),
  [
    ("tiny", 505_672, 358_216, 288_488),
    ("tiny_dense", 1_875_648, 1_875_648, 0),
    ("small", 2_272_088, 1_276_760, 667_240),
    ("small_dense", 4_959_488, 4_959_488, 0),
    ("1b", 1_392_576_512, 1_392_576_512, 0),
    ("7b", 6_910_365_696, 6_910_365_696, 0),
    ("67b", 67_425_001_472, 67_425_001_472, 0),
    ("moe_16b", 16_375_728_128, 2_828_650_496, 0),
    ("v2_lite", 15_706_484_224, 2_661_150_208, 0),
    ("v2", 235_741_434_880, 21_375_800_320, 0),
    ("v3", 671_026_419_200, 37_552_297_472, 11_610_068_224),
  ],
)
def test_parameters_of_a_config(name, total, active, mtp):
  model = load_config(name).model
  assert count_parameters(model) == ParameterCounts(total, active, active - model.vocab * model.embed, mtp)
  (description,) = (line for line in list_configs().splitlines() if line.split()[0] == name)
  number, unit = re.search(r" ([\d.]+)([MB]) parameters", description).groups()
  assert f"{total / {'M': 1e6, 'B': 1e9}[unit]:.1f}" == number


@pytest.mark.parametrize(
  ("total", "active", "changes", "moe"),
  [
    (
      1_966_912_000, 316_049_920, dict(vocab=8000, embed=1280, layers=9, first_dense_layers=0), (63, 1, 7, 853)
    ),  # DeepSeekMoE 2B
    (
      144_612_773_888, 22_187_331_584, dict(vocab=102_400, embed=4096, layers=62, first_dense_layers=1, mlp=21_888),
      (128, 4, 12, 1408),
    ),  # DeepSeekMoE 145B
  ],
)  # fmt: skip
def test_parameters_of_a_configs_other_models(total, active, changes, moe):
  heads = changes["embed"] // 128
  names = ("num_routed_experts", "num_shared_experts", "num_experts_per_token", "mlp")
  model = ModelConfig(
    **changes, attention=AttentionConfig(heads=heads, kv_heads=heads, head_dim=128),
    moe=MoEConfig(**dict(zip(names, moe, strict=True))),
  )  # fmt: skip
  counts = count_parameters(model)
  assert (counts.total, counts.active) == (total, active)


def loss_and_gradient(config):
  """(function, arguments): one loss chunk; unrolled with one layer, since XLA counts a loop's body once."""

  def loss(params, buffers, tokens):
    model = nnx.merge(graphdef(config), params, buffers)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    hidden = model(inputs)[0]
    total = cross_entropy(model.output_embedding(), hidden, targets, SEQ)[1]
    ahead = jnp.stack([inputs] * config.num_mtp_layers) if config.num_mtp_layers else ()
    for seen, _ in model.mtp(hidden, ahead, model.batch_context(inputs)):
      total += cross_entropy(model.output_embedding(), seen, targets, SEQ)[1]
    return total

  params, buffers = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
  return jax.grad(loss), (params, buffers, jax.ShapeDtypeStruct((BATCH, SEQ + 1), jnp.int32))


def dot_general_flops(jaxpr, count=1):
  """2mkn over every dot_general in a jaxpr, loops times their length."""
  total = 0
  for eqn in jaxpr.eqns:
    inner_count = count * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
    if eqn.primitive.name == "dot_general":
      (contract, _), _ = eqn.params["dimension_numbers"]
      depth = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
      total += count * 2 * math.prod(eqn.outvars[0].aval.shape) * depth
    for value in eqn.params.values():
      if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
        total += dot_general_flops(getattr(value, "jaxpr", value), inner_count)
  return total


@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(SMALL, layers=3), V3], ids=["one", "three", "v3"])
def test_flops_equal_every_matmul_in_the_program(config):
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    function, arguments = loss_and_gradient(config)
    counted = dot_general_flops(jax.make_jaxpr(function)(*arguments).jaxpr)
  expected = BATCH * SEQ * training_flops(config, SEQ).full
  if config.attention.kind == "mla":  # its scores are made once more in the backward pass
    a, layers = config.attention, config.layers + config.num_mtp_layers
    expected += 2 * BATCH * a.heads * (a.qk_nope_head_dim + a.qk_rope_head_dim) * layers * SEQ**2
  assert counted == pytest.approx(expected, rel=1e-12)


def test_near_xla_cost_analysis():
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    function, arguments = loss_and_gradient(SMALL)
    xla = jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]
  ours = BATCH * SEQ * training_flops(SMALL, SEQ).full
  # XLA adds softmax, norms and the like: a few per cent at this width.
  assert 1.0 < xla / ours < 1.25


def test_causal_attention_counts_the_lower_triangle():
  flops, pairs = training_flops(SMALL, SEQ), SEQ * (SEQ + 1) / 2
  per_pair = 3 * 2 * 2 * SMALL.attention.heads * SMALL.attention.head_dim * SMALL.layers
  assert flops.attention_causal * SEQ == per_pair * pairs
  assert flops.attention_full * SEQ == per_pair * SEQ**2
  assert flops.causal == flops.matmul + flops.attention_causal


def test_steps_that_spend_equal_flops():
  def config(**changes):
    return Config(
      model=dataclasses.replace(SMALL, **changes), data=DataConfig(seq=SEQ), train=TrainConfig(global_batch=BATCH)
    )

  def spent(config, steps):
    return training_flops(config.model, SEQ).causal * SEQ * BATCH * steps

  budget = spent(config(), 1000)
  assert steps_for_flops(config(), budget) == 1000
  with_mtp = config(num_mtp_layers=1)
  steps = steps_for_flops(with_mtp, budget)
  assert steps < 700 and spent(with_mtp, steps) == pytest.approx(budget, rel=1e-3)
  with pytest.raises(ConfigError, match="fewer than those of one update"):
    steps_for_flops(config(), spent(config(), 0.9))
  with pytest.raises(ConfigError, match="flops=nan"):
    steps_for_flops(config(), math.nan)
