"""Counts of traced programs: FLOPs, collective bytes and HBM bytes, against hand counts and compiled programs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.config_sections import DataConfig, MeshConfig, ParallelConfig, TrainConfig
from deepseek_jax.kernels.fp8_grouped_matmul.api import fp8_grouped_matmul
from deepseek_jax.kernels.fp8_matmul.api import fp8_matmul
from deepseek_jax.kernels.quantize.api import quantize
from deepseek_jax.mesh import AXES, make_mesh
from deepseek_jax.model_config import AttentionConfig, MoEConfig
from deepseek_jax.plan.count import RuntimeAssumptions, count_operations
from deepseek_jax.plan.flops import training_flops
from deepseek_jax.plan.hlo import HloProgram
from deepseek_jax.plan.memory import with_xla_attention
from deepseek_jax.plan.plan import runtime_assumptions, trace_operations
from deepseek_jax.plan.roofline import matmul_seconds
from deepseek_jax.plan.topology import parse_topology
from deepseek_jax.training.step import abstract_step
from tests import configs

MODEL = dataclasses.replace(
  configs.DENSE, vocab=272, embed=64, layers=3, mlp=96, compute_dtype="bfloat16", remat="none",
  attention=AttentionConfig(heads=4, kv_heads=2, head_dim=16),
)  # fmt: skip
EXPERTS = MoEConfig(num_routed_experts=8, num_experts_per_token=2, mlp=32, score="sigmoid", norm_topk_prob=True)
DENSE = configs.make_config(MODEL, seq=64, global_batch=16, microbatch=8)
MOE = configs.with_model(DENSE, first_dense_layers=1, moe=EXPERTS)


def on(config, **sizes):
  return dataclasses.replace(config, mesh=MeshConfig(**({"data": 1} | sizes)))


def count_step(config, assumptions=None):
  sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
  return trace_operations(config, abstract_step, sizes, assumptions or runtime_assumptions(config, "TPU v5p"))


def total(operations, amount, kind=""):
  return sum(o.count * getattr(o, amount) for o in operations if kind in o.kind)


def test_flops_of_a_step_are_those_of_the_model():
  """Without recomputation: 2 microbatches of 8 sequences, and attention between every pair of positions."""
  flops = total(count_step(DENSE), "flops")
  assert flops == pytest.approx(training_flops(DENSE.model, 64).full * 16 * 64, rel=1e-9)


def test_flops_are_divided_over_the_devices():
  one = total(count_step(DENSE), "flops")
  for sizes in (dict(fsdp=4), dict(tensor=2, fsdp=2), dict(data=2, tensor=2)):
    assert total(count_step(on(DENSE, **sizes)), "flops") == pytest.approx(one / 4, rel=1e-9)


def test_a_pipeline_counts_its_ticks():
  """Four microbatches through two stages of one layer: five ticks each way for four, and the bubble is counted."""
  config = dataclasses.replace(on(DENSE, stage=2), model=dataclasses.replace(DENSE.model, layers=2, remat="full"))
  config = dataclasses.replace(
    config, train=TrainConfig(global_batch=16, microbatch=4), parallel=ParallelConfig(zero=1)
  )
  unsharded = dataclasses.replace(config, mesh=MeshConfig(data=1), parallel=ParallelConfig())
  matmuls = [o for o in count_step(config) if o.kind == "matmul"]
  swiglu_flops = 2 * 4 * 64 * (64 * 96)  # one matmul of the SwiGLU, of a microbatch
  ticks = [o.count for o in matmuls if o.flops == swiglu_flops]
  assert ticks and all(times == pytest.approx(5) for times in ticks)
  one_device = total(count_step(unsharded), "flops")
  assert one_device / 2 < total(count_step(config), "flops") < one_device


@pytest.mark.parametrize(
  "sizes", [dict(fsdp=4), dict(fsdp=2, tensor=2), dict(data=2, fsdp=2), dict(fsdp=2, expert=2)], ids=str
)
def test_collectives_are_those_of_the_compiled_program(sizes):
  """By axes and in bytes."""
  config = on(MOE if "expert" in sizes else DENSE, **sizes)
  # XLA for CPUs has no bfloat16 collectives.
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype="float32"))
  mesh = make_mesh(config.mesh, jax.devices()[:4])
  with jax.set_mesh(mesh):
    step, arguments = abstract_step(config, mesh)
    text = jax.jit(step, donate_argnums=0).lower(*arguments).compile().as_text()
  expected, found = {}, {}
  for c in HloProgram(text, dict(mesh.shape)).collectives():
    expected[frozenset(c.axes)] = expected.get(frozenset(c.axes), 0) + c.count * c.collective_bytes
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    step, arguments = abstract_step(config, mesh.abstract_mesh)
    ours = count_operations(jax.jit(step, donate_argnums=0).trace(*arguments).jaxpr, dict(mesh.shape))
  for o in ours:
    if o.collective_bytes:
      found[frozenset(o.axes)] = found.get(frozenset(o.axes), 0) + o.count * o.collective_bytes
  # XLA leaves out gathers of arrays that it finds to be gathered already.
  assert set(found) == set(expected)
  assert all(0.8 * found[axes] <= expected[axes] <= 1.001 * found[axes] for axes in found), (found, expected)


def test_hbm_bytes_of_a_matmul_and_of_fusions():
  """An elementwise chain costs nothing by itself; a matmul reads two arrays and writes one; results are written."""

  def function(x, w):
    return jnp.tanh(jnp.exp(x) * 2 @ w)

  a = jax.ShapeDtypeStruct((64, 64), jnp.float32)
  found = count_operations(jax.jit(function).trace(a, a).jaxpr, {})
  one = 64 * 64 * 4
  (matmul,) = [o for o in found if o.kind == "matmul"]
  # x is read, exp of it is written and read by the matmul; w is read; the result is written ..
  assert matmul.hbm_bytes == 5 * one and matmul.flops == 2 * 64**3
  # .. read again, and tanh of it is written.
  assert total(found, "hbm_bytes") == 7 * one


def test_kernels_count_by_their_cost_estimate_and_group_fill():
  m, n, k, groups = 256, 384, 1024, 2
  operand = lambda tile, *shape: jax.eval_shape(lambda: quantize(jnp.zeros(shape), tile, implementation="xla"))
  x, w = operand((1, 128), m, k), operand((128, 128), groups, n, k)
  sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)

  def grouped(x, w, sizes):
    return fp8_grouped_matmul(x, w, sizes, implementation="pallas_tpu")

  def dense(x, w):
    return fp8_matmul(x, w[0], implementation="pallas_tpu")

  (matmul,) = [o for o in count_operations(jax.jit(dense).trace(x, w).jaxpr, {}) if o.kind == "matmul"]
  assert matmul.flops == 2 * m * n * k and matmul.fp8
  assert matmul_seconds(matmul, parse_topology("tpu7x").chip, 256) == matmul.flops / 1153.5e12 / 0.79
  # The matrix that is taken out of two is read and written; scales are a thirty-second of values or less, and written
  # anew.
  least = (m * k + n * k + 4 * m * n) + 2 * n * k
  assert least < matmul.hbm_bytes < 1.1 * least
  found = count_operations(jax.jit(grouped).trace(x, w, sizes).jaxpr, {}, RuntimeAssumptions(grouped_matmul_fill=0.5))
  assert total(found, "flops", "grouped matmul") == total(found, "flops") == m * n * k


def test_fused_attention_writes_no_scores_and_counts_the_causal_blocks():
  """Two matmuls forward and seven backward, where XLA has two and four, for 3 of 4 blocks."""
  config = dataclasses.replace(DENSE, data=DataConfig(seq=1024))
  plain, fused = count_step(with_xla_attention(config)), count_step(config)
  full = training_flops(config.model, 1024).attention_full * 16 * 1024
  assert total(fused, "flops", "fused attention") == pytest.approx(full * 9 / 6 * 3 / 4, rel=1e-9)
  rows = (
    2 * 4 * 16 * config.model.layers * 16 * 1024
  )  # backward, each result times its gradient, outside of the kernels
  assert total(fused, "flops") - total(plain, "flops") == pytest.approx(full * (9 / 6 * 3 / 4 - 1) + rows, rel=1e-9)
  scores = 16 * 4 * 1024 * 1024 * 4 * config.model.layers  # float32, written at least once
  assert total(plain, "hbm_bytes") - total(fused, "hbm_bytes") > 3 * scores


def test_ragged_all_to_alls_of_dispatch_and_combine():
  """2 MoE layers of 2 microbatches, with nothing recomputed: a dispatch and a combine, forward and backward."""
  found = [o for o in count_step(on(MOE, expert=4)) if o.kind == "ragged-all-to-all"]
  rows = 2 * 64 * 1.75 * 3 / 4  # of 2 sequences, each for 1.75 devices of 4, of which one is its own
  assert {(o.collective_bytes, o.count) for o in found} == {(rows * 64 * 2, 2 * 2), (rows * 4 * 4, 2 * 2)}
  assert sum(o.collective_bytes == rows * 64 * 2 for o in found) == 4 and len(found) == 6


def test_runtime_assumptions_of_expert_buffers():
  """Four devices with two experts each and buffers for twice an even load."""
  moe = dataclasses.replace(MOE.model.moe, buffer_factor=2.0)
  config = dataclasses.replace(on(MOE, expert=4), model=dataclasses.replace(MOE.model, moe=moe))
  assumptions = runtime_assumptions(config, "TPU v5p")
  load, block = 2 * 64 * 2, 64  # 2 sequences a device and microbatch; a block is half a mean group
  assert assumptions.grouped_matmul_fill == pytest.approx((load + block) / (2 * load + 2 * block))
  # Two choices among four devices fall on 1.75 of them.
  assert assumptions.ragged_fill == pytest.approx(1.75 / 2)
  # A padded all-to-all sends a row per token to each of four devices, where a token has two sorted choices.
  assert runtime_assumptions(config, "TPU v5 lite").ragged_fill == pytest.approx(4 / 2)
