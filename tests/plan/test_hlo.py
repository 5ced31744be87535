"""Optimized HLO: trip counts of loops, collectives by mesh axis, and FLOPs of matmuls in all their forms."""

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.config_sections import MeshConfig
from deepseek_jax.mesh import AXES, make_mesh
from deepseek_jax.plan.hlo import HloProgram
from deepseek_jax.sharding import spmd

pytestmark = pytest.mark.jax_version

SIZES = dict.fromkeys(AXES, 1) | {"fsdp": 4, "expert": 16}


def module(instruction):
  return f"""HloModule test

%add (a: f32[], b: f32[]) -> f32[] {{
  ROOT %s = f32[] add(%a, %b)
}}

ENTRY %main (p: bf16[8,16]) -> bf16[8,16] {{
  %p = bf16[8,16]{{1,0:T(8,128)(2,1)}} parameter(0)
  %k = bf16[16,32]{{1,0}} parameter(1)
  {instruction}
}}
"""


@pytest.mark.parametrize(
  ("groups", "axes"),
  [
    ("mesh['data'=1,'fsdp'=4,'expert'=16] {'fsdp','expert'}", ("fsdp", "expert")),
    ("mesh['axis_0'=4,'axis_1'=16] {'axis_1'}", ("expert",)),
    ("mesh['axis_0'=16,'axis_1'=4], device_ids=([4,16]T(1,0)) {'axis_1'}", ("fsdp",)),
    ("[4,16]<=[64]", ("expert",)),
    ("[16,4]<=[4,16]T(1,0)", ("fsdp",)),
    ("{{0,16,32,48},{1,17,33,49}}", ("fsdp",)),
    ("{}", ("fsdp", "expert")),
  ],
)
def test_axes_of_a_group(groups, axes):
  text = module(f"ROOT %r = f32[64,2]{{1,0}} all-reduce(%p), replica_groups={groups}, to_apply=%add")
  (found,) = HloProgram(text, SIZES).collectives()
  n = 1
  for axis in axes:
    n *= SIZES[axis]
  assert (found.kind, found.axes, found.largest_array_bytes, found.count) == ("all-reduce", axes, 512, 1)
  assert found.collective_bytes == pytest.approx(2 * (n - 1) / n * 512)


@pytest.mark.parametrize(
  ("instruction", "flops"),
  [
    ("ROOT %r = f32[8,32]{1,0} dot(%p, %k), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 2 * 8 * 16 * 32),
    ("ROOT %r = f32[8,32]{1,0} convolution(%p, %k), dim_labels=bf_io->bf", 2 * 8 * 16 * 32),
  ],
)
def test_matmuls(instruction, flops):
  assert HloProgram(module(instruction), SIZES).matmul_flops() == flops


@pytest.mark.parametrize(("name", "counted"), [("fp8_matmul.1", 1), ("fp8_grouped_matmul.1", 0.5), ("gmm.1", 0.5)])
@pytest.mark.parametrize(
  "cost",
  ['{"flops":"8192","bytes_accessed":"4096"}', '{\n"bytes_accessed":4096,\n"flops":8192\n}, "format": 1'],
  ids=["alone", "fused"],
)
def test_flops_of_kernels_by_group_fill(cost, name, counted):
  """As libtpu 0.0.42 and 0.0.50 write it; grouped ones count by their fill."""
  text = module(
    f'%{name} = f32[8,32]{{1,0}} custom-call(%p, %k), custom_call_target="tpu_custom_call", backend_config='
    f'{{"custom_call_config":{{"body":"TUzv", "cost_estimate": {cost}}}}}\n'
    "  ROOT %r = f32[8,32]{1,0} dot(%p, %k), lhs_contracting_dims={1}"
  )
  assert HloProgram(text, SIZES).matmul_flops(grouped_matmul_fill=0.5) == 8192 * (1 + counted)


def test_collectives_of_a_sparse_core_count():
  """As libtpu writes it for tpu7x: a call on another core."""
  text = module('%start = ((), (), (s32[1]{0})) call-start(), async_execution_thread="sparsecore", to_apply=%sent')
  message = "ROOT %r = f32[64,2]{1,0} all-reduce(%q), replica_groups={}, to_apply=%add"
  sent = f"%sent (q: f32[64,2]) -> f32[64,2] {{\n  %q = f32[64,2]{{1,0}} parameter(0)\n  {message}\n}}\n"
  (found,) = HloProgram(text.replace("ENTRY", f"{sent}\nENTRY"), SIZES).collectives()
  assert (found.kind, found.count, found.largest_array_bytes) == ("all-reduce", 1, 512)


@pytest.mark.parametrize(("name", "flops"), [("splash_mha_dq", 1000), ("tgmm.3", 500)])
def test_flops_of_kernels_from_several_lines(name, flops):
  """As it is in libtpu's HLO, on several lines; half of the rows of a grouped matmul are full."""
  config = '{"custom_call_config":{"body":"TUzv","cost_estimate":{"flops":"1000","bytes_accessed":"8"}}}'
  config = f'{{kernel_metadata={{\n"xprof_metadata":"1"\n}}}}, frontend_attributes={config}'
  text = module(
    f'%{name} = f32[8,32] custom-call(%p, %k), custom_call_target="tpu_custom_call", frontend_attributes={config}'
  )
  assert HloProgram(text, SIZES).matmul_flops(grouped_matmul_fill=0.5) == flops


def convolution(left, right, out, labels, window):
  text = module("")
  text = text.replace("bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)", f"bf16[{left}] parameter(0)")
  text = text.replace("bf16[16,32]{1,0} parameter(1)", f"bf16[{right}] parameter(1)")
  line = f"ROOT %r = f32[{out}] convolution(%p, %k), window={{{window}}}, dim_labels={labels}"
  return HloProgram(text.replace("  \n}\n", f"  {line}\n}}\n"), SIZES).matmul_flops()


def test_convolutions_that_are_batched_matmuls():
  """As XLA writes them for TPUs: scores of 128 heads, a contraction over heads, and heads as a window of the kernel."""
  batched = convolution("64,128,32", "64,128,32", "128,64,64", "b0f_o0i->0bf", "size=128 stride=127 lhs_dilate=128")
  assert batched == 2 * 128 * 64 * 64 * 32
  contracted = convolution("64,128,32", "128,32,56", "64,56,1", "b0f_0io->bf0", "size=128")
  assert contracted == 2 * 64 * 56 * 128 * 32
  window = convolution("64,96,1", "96,12,1", "64,12,1", "bf0_io0->bf0", "size=1 pad=0_0 rhs_reversal=1")
  assert window == 2 * 64 * 96 * 12


def test_a_loop_counts_as_often_as_it_runs():
  """Seven layers on four devices: an all-gather and a matmul each, and one all-reduce after them."""
  layers, rows, width = 7, 8, 32
  mesh = make_mesh(MeshConfig(data=1, fsdp=4), jax.devices()[:4])

  def device(x, weights):
    def layer(x, w):
      w = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
      return jnp.tanh(x @ w), None

    return jax.lax.psum(jax.lax.scan(layer, x, weights)[0].sum(), "fsdp")

  with jax.set_mesh(mesh):
    function = spmd(device, (jax.P("fsdp"), jax.P(None, "fsdp")), jax.P(), differentiable=False)
    x = jax.ShapeDtypeStruct((4 * rows, width), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("fsdp")))
    w = jax.ShapeDtypeStruct((layers, width, width), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(None, "fsdp")))
    text = jax.jit(function).lower(x, w).compile().as_text()
  program = HloProgram(text, dict(mesh.shape))
  gathers = [c for c in program.collectives() if c.kind == "all-gather"]
  assert [(c.axes, c.count, c.collective_bytes) for c in gathers] == [(("fsdp",), layers, 3 / 4 * 4 * width**2)]
  assert [c.count for c in program.collectives() if c.kind == "all-reduce"] == [1]
  assert program.matmul_flops() == layers * 2 * rows * width**2
