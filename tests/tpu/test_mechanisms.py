"""What the design takes for granted of XLA on TPUs. A new libtpu may change any of it."""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from deepseek_jax.kernels.grouped_matmul.api import grouped_matmul
from deepseek_jax.kernels.grouped_matmul.xla import ragged_dot
from deepseek_jax.plan.compile import compile_for_tpu
from deepseek_jax.sharding import pvary, spmd
from tests.tpu.pods import REMATERIALIZED, pod


def abstract(shape, dtype, *layout, kind=None):
  sharding = NamedSharding(jax.sharding.get_mesh(), jax.P(*layout), **({"memory_kind": kind} if kind else {}))
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def test_a_relayout_through_whole_arrays_is_reported():
  """So that other tests may look for the words that are not there."""
  with jax.set_mesh(pod("v5p:2x2x2", data=2, fsdp=2, expert=2)):
    x = abstract((24, 40, 56), jnp.float32, "data", "fsdp", None)
    good = compile_for_tpu(lambda x: jnp.cos(x), x)
    bad = compile_for_tpu(lambda x: jnp.sin(jax.sharding.reshard(jnp.cos(x), jax.P(("expert", "fsdp", "data")))), x)
  assert REMATERIALIZED not in good.log and REMATERIALIZED in bad.log


@pytest.mark.parametrize("slices", [1, 2])
def test_meshes(slices):
  mesh = pod(f"{slices}*v5p:4x4x4", data=2 * slices, stage=2, fsdp=2, expert=4, tensor=2)  # sizes that split the torus
  assert mesh.size == 64 * slices
  found = [{getattr(device, "slice_index", None) for device in devices.flat} for devices in mesh.devices]
  assert found == ([{None}] * 2 if slices == 1 else [{0}, {0}, {1}, {1}])


def step_with_moments_on_host(w, m, g):
  m = 0.9 * jax.device_put(m, jax.memory.Space.Device) + 0.1 * g
  return w - m, jax.device_put(m, jax.memory.Space.Host)


def test_moments_on_host():
  """Of many arrays a few are on the device at a time."""
  arrays, shape = 32, (16_384, 8192)  # 64 MiB each on a device
  step = lambda *trees: tuple(zip(*map(step_with_moments_on_host, *trees), strict=True))
  with jax.set_mesh(pod("v5p:4x4x4", data=8, fsdp=8)):
    device, host = (abstract(shape, jnp.float32, "fsdp", None, kind=kind) for kind in ("device", "pinned_host"))
    ours = (device,) * arrays, (host,) * arrays, (device,) * arrays
    out = jax.tree.map(lambda a: a.sharding, ours[:2])
    program = compile_for_tpu(step, *ours, donate_argnums=(0, 1), out_shardings=out)
  one = 64 * 2**20
  assert program.host_argument == program.host_aliased == arrays * one
  assert program.argument == 2 * arrays * one
  assert program.temporary < 16 * one


def test_activations_on_host():
  """Residuals of a scan over layers, inside a manual program: all on the host, in turn on the device."""
  layers, tokens, embed = 8, 4096, 2048
  policy = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[], names_which_can_be_offloaded=["block"], offload_src="device", offload_dst="pinned_host"
  )

  def gradients(stack, x):
    stack, x = pvary((stack, x))
    layer = lambda x, w: (x + jnp.tanh(checkpoint_name(x, "block") @ w), None)
    loss = lambda stack: jax.lax.scan(jax.checkpoint(layer, policy=policy), x, stack)[0].astype(jnp.float32).sum()
    return jax.lax.psum(jax.grad(loss)(stack), ("fsdp",))

  with jax.set_mesh(pod("v5p:2x2x1", fsdp=4)):
    stack = abstract((layers, embed, embed), jnp.bfloat16, None, None, None)
    x = abstract((4 * tokens, embed), jnp.bfloat16, "fsdp", None)
    program = compile_for_tpu(spmd(gradients, (jax.P(), jax.P("fsdp")), jax.P()), stack, x)
  residual = tokens * embed * 2
  # XLA peels an iteration off the loop, and may keep a spare buffer.
  assert layers * residual <= program.host_temporary <= (layers + 1) * residual


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("implementation", ["auto", "ragged_dot"])
def test_grouped_products_do_the_useful_work(topology, implementation):
  """Of four experts, at V3's widths: forward, and backward twice that."""
  rows, k, n, groups = 8192, 7168, 2048, 4

  def gradients(x, w, sizes):
    x, w, sizes = pvary((x, w, sizes))

    def product(x, w):
      return ragged_dot(x, w, sizes, 128) if implementation == "ragged_dot" else grouped_matmul(x, w, sizes, block=128)

    return jax.grad(lambda x, w: jnp.square(product(x, w).astype(jnp.float32)).sum(), (0, 1))(x, w)

  mesh = pod(topology, expert=-1)
  with jax.set_mesh(mesh):
    shared = jax.P("expert")
    x = abstract((rows * mesh.size, k), jnp.bfloat16, "expert", None)
    w = abstract((groups * mesh.size, k, n), jnp.bfloat16, "expert", None, None)
    sizes = abstract((groups * mesh.size,), jnp.int32, "expert")
    program = compile_for_tpu(spmd(gradients, (shared,) * 3, (shared,) * 2), x, w, sizes)
  # libtpu 0.0.42, of jax 0.10, multiplies every row by every group for the gradient of the weights of a ragged_dot.
  kernel = '"tpu_custom_call"' in program.hlo and "%tgmm" in program.hlo
  assert kernel == (implementation == "auto" and "v5p" not in topology)
  weights = groups if jax.__version_info__ < (0, 11) and not kernel else 1
  assert program.flops == pytest.approx((2 + weights) * 2 * rows * k * n, rel=0.01)
