"""Kernels where a model has them: layers in a scan, rematerialized, differentiated, in the program of each device."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from deepseek_jax.kernels.fp8_linear import FP8_ACTIVATION, Recipe, fp8_linear, fp8_ragged_linear
from deepseek_jax.plan.compile import compile_for_tpu
from deepseek_jax.plan.hlo import HloProgram
from deepseek_jax.sharding import pvary, spmd
from tests.tpu.pods import pod

LAYERS, ROWS, EMBED, MLP, GROUPS = 3, 512, 1024, 384, 4


def loss(by_group, stack, x, sizes):
  """Of layers embed -> 2 mlp -> embed."""
  recipe = Recipe(implementation="pallas")
  product = functools.partial(fp8_ragged_linear, group_sizes=sizes) if by_group else fp8_linear

  @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(FP8_ACTIVATION))
  def layer(x, weights):
    gate, up, down = weights
    gate, up = product(x, gate, up, recipe=recipe)
    return x + product(jax.nn.silu(gate) * up, down, recipe=recipe)[0], None

  return jax.lax.scan(layer, x, pvary(stack))[0].astype(jnp.float32).sum()


@pytest.mark.parametrize("by_group", [False, True])
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "tpu7x:2x2x1"])
def test_gradients_of_layers_inside_a_manual_program(topology, by_group):
  mesh = pod(topology, fsdp=-1)
  with jax.set_mesh(mesh):
    whole, shared = jax.P(), jax.P("fsdp")
    array = lambda layout, dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, layout))
    groups = (GROUPS,) if by_group else ()
    wide, narrow = (array(whole, jnp.bfloat16, LAYERS, *groups, *matrix) for matrix in ((EMBED, MLP), (MLP, EMBED)))
    x = array(shared, jnp.bfloat16, ROWS * mesh.size, EMBED)
    sizes = array(shared, jnp.int32, GROUPS * mesh.size)

    def gradients(*arrays):
      dw, dx = jax.grad(functools.partial(loss, by_group), argnums=(0, 1))(*pvary(arrays))
      return jax.lax.psum(dw, "fsdp"), dx

    function = spmd(gradients, (whole, shared, shared), (whole, shared))
    program = compile_for_tpu(function, (wide, wide, narrow), x, sizes)
  # Three matrices; each forward, recomputed, and backward twice; the last of a recomputed layer is not needed.
  done = 2 * ROWS * EMBED * MLP * LAYERS * (3 + 2 + 2 * 3)
  assert HloProgram(program.hlo, dict(mesh.shape)).matmul_flops() == pytest.approx(done, rel=1e-6)
  assert "tpu_custom_call" in program.hlo and "dot(" not in program.hlo
