"""The grouped product against one NumPy product a group, forward and backward, in every implementation."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from deepseek_jax.kernels import implementations
from deepseek_jax.kernels.grouped_matmul import supports, xla
from deepseek_jax.kernels.grouped_matmul.api import block_rows, grouped_matmul
from deepseek_jax.model.dispatch import ragged
from tests.kernels.marks import NEEDS_JAX_0_11

SIZES = {
  "several": (4, 8, 4),
  "empty groups": (0, 12, 0, 0, 4),
  "one group": (16,),
  "all in the last": (0, 0, 16),
  "rows of no group": (4, 0, 4),
}
hopper = functools.partial(grouped_matmul, block=1, implementation="pallas_gpu")


def problem(sizes, rows=16, k=6, n=5, dtype=np.float32):
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(rows, k)), rng.normal(size=(len(sizes), k, n))
  x[sum(sizes) :] = 0
  return [jnp.asarray(a, dtype) for a in (x, w, rng.normal(size=(rows, n)))], jnp.asarray(sizes, jnp.int32)


def expected(x, w, dy, sizes):
  """(y, dx, dw) in float64."""
  x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
  y, dx, dw, start = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape), 0
  for group, size in enumerate(np.asarray(sizes)):
    part = slice(start, start + size)
    y[part], dx[part], dw[group] = x[part] @ w[group], dy[part] @ w[group].T, x[part].T @ dy[part]
    start += size
  return y, dx, dw


def megablox(x, w, sizes, block):
  return grouped_matmul(x, w, sizes, block=block, implementation="pallas_tpu")


@pytest.mark.parametrize("product", [xla.blocked_matmul, xla.ragged_dot, megablox])
@pytest.mark.parametrize("name", SIZES)
def test_forward_and_backward(product, name):
  (x, w, dy), sizes = problem(SIZES[name])
  y, vjp = jax.vjp(jax.jit(lambda x, w: product(x, w, sizes, 4)), x, w)
  for ours, reference in zip((y, *vjp(dy)), expected(x, w, dy, sizes), strict=True):
    np.testing.assert_allclose(ours, reference, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_groups_that_share_tiles(dtype):
  """The kernel for TPUs takes groups of any sizes.

  Its tiles are of 128 rows here, and the last ones are no whole tiles.
  """
  (x, w, dy), sizes = problem((100, 0, 130, 30, 0), rows=300, k=24, n=20, dtype=jnp.dtype(dtype))
  y, vjp = jax.vjp(jax.jit(lambda x, w: megablox(x, w, sizes, 1)), x, w)
  for ours, reference in zip((y, *vjp(dy)), expected(x, w, dy, sizes), strict=True):
    assert ours.dtype == dtype
    error = np.linalg.norm(np.asarray(ours, np.float64) - reference) / np.linalg.norm(reference)
    assert error < (1e-6 if dtype == "float32" else 2**-8)


@pytest.mark.kernels
@pytest.mark.parametrize("sizes", [(100, 0, 130, 30, 0), (0, 0, 128), (300,)], ids=str)
def test_on_hopper(sizes, on_gpu):
  (x, w, dy), sizes = problem(sizes, rows=300, k=128, n=256, dtype=jnp.bfloat16)
  y, vjp = jax.vjp(jax.jit(lambda x, w: hopper(x, w, sizes)), x, w)
  for ours, reference in zip((y, *vjp(dy)), expected(x, w, dy, sizes), strict=True):
    assert ours.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(ours, np.float64) - reference) < 2**-8 * np.linalg.norm(reference)


@NEEDS_JAX_0_11
def test_on_hopper_it_is_traced_inside_shard_map():
  """With types of varying arrays checked; the gradient of a shared matrix is summed over devices."""
  (x, w, _), sizes = problem((100, 28), rows=128, k=128, n=128, dtype=jnp.bfloat16)
  mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
  split = jax.P("devices")

  def loss(x, w, sizes):
    return jax.lax.psum((jax.checkpoint(hopper)(x, w, sizes).astype(jnp.float32) ** 2).sum(), "devices")

  with jax.set_mesh(mesh):
    both = [jax.device_put(jnp.concatenate([a, a]), jax.NamedSharding(mesh, split)) for a in (x, sizes)]
    sharded = jax.shard_map(loss, in_specs=(split, jax.P(), split), out_specs=jax.P())
    w = jax.device_put(w, jax.NamedSharding(mesh, jax.P()))
    traced = jax.jit(jax.grad(sharded, argnums=(0, 1))).trace(both[0], w, both[1])
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  # Forward, and both gradients.
  assert text.count("custom_call @mosaic_gpu") == 3 and text.count("stablehlo.all_reduce") == 1


@pytest.mark.parametrize(
  ("dtype", "k", "word"), [("float32", 128, "for bfloat16, not float32"), ("bfloat16", 120, "multiples of 128, not (120, 128)")]
)  # fmt: skip
def test_what_hopper_s_kernel_does_not_do(dtype, k, word):
  (x, w, _), sizes = problem((8,), rows=8, k=k, n=128, dtype=jnp.dtype(dtype))
  assert word in supports.pallas_gpu("grouped_matmul", x, w, sizes, 8).reason


@pytest.mark.parametrize(
  ("device", "dtype", "file"),
  [
    ("NVIDIA H200", "bfloat16", "pallas_gpu"),
    ("NVIDIA H200", "float32", "xla"),
    ("TPU v6 lite", "bfloat16", "pallas_tpu"),
    ("TPU v5", "bfloat16", "xla"),
    ("cpu", "bfloat16", "xla"),
  ],
)
def test_the_platform_s_kernel_is_chosen_where_it_does_this(monkeypatch, device, dtype, file):
  load = implementations.load_function
  monkeypatch.setattr(implementations, "device_kind", lambda: device)
  monkeypatch.setattr(
    implementations, "load_function", lambda *names: load(*names) if names[2] == "supports" else lambda *_: names[2]
  )
  (x, w, _), sizes = problem(SIZES["several"], k=128, n=128, dtype=dtype)
  assert grouped_matmul(x, w, sizes, block=4) == file


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-13), ("bfloat16", 2e-2)])
def test_dtypes(dtype, tolerance):
  with jax.enable_x64(True):
    (x, w, dy), sizes = problem(SIZES["several"], dtype=dtype)
    y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, block=4, implementation="xla"), x, w)
    for ours, reference in zip((y, *vjp(dy)), expected(x, w, dy, sizes), strict=True):
      assert ours.dtype == dtype
      np.testing.assert_allclose(np.asarray(ours, np.float64), reference, rtol=tolerance, atol=tolerance)


def test_inside_shard_map_the_gradients_of_a_shared_matrix_add_up():
  (x, w, dy), sizes = problem(SIZES["several"])
  mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
  _, dx, dw = expected(x, w, dy, sizes)
  with jax.set_mesh(mesh):
    split = jax.P("devices")
    both = [jax.device_put(jnp.concatenate([a, a]), jax.NamedSharding(mesh, split)) for a in (x, dy, sizes)]
    product = jax.shard_map(
      lambda x, w, sizes: grouped_matmul(x, w, sizes, block=4, implementation="xla"),
      in_specs=(split, jax.P(), split), out_specs=split,
    )  # fmt: skip
    gradients = jax.jit(jax.grad(lambda x, w: (product(x, w, both[2]) * both[1]).sum(), argnums=(0, 1)))
    ours_x, ours_w = jax.block_until_ready(gradients(both[0], jax.device_put(w, jax.NamedSharding(mesh, jax.P()))))
  np.testing.assert_allclose(ours_x, np.concatenate([dx, dx]), rtol=2e-5, atol=2e-6)
  np.testing.assert_allclose(ours_w, 2 * dw, rtol=2e-5, atol=2e-6)


def test_a_block_is_at_most_half_a_mean_group_so_that_padding_stays_small():
  for rows in (1, 64, 2048, 65_536):
    for groups in (1, 8, 64, 256):
      block = block_rows(rows, groups)
      assert block & (block - 1) == 0 and 8 <= block <= 128
      assert block == 8 or 2 * block <= rows // groups


@pytest.mark.parametrize("experts", [8, 64])
def test_work_follows_the_rows_and_not_the_groups(monkeypatch, experts):
  """Products are counted as they run, inside loops too: three matrices, in three products each, meet a padded row once.

  A group is padded by less than a block, which is at most half a mean group: so rows grow by less than half.
  """
  einsum, multiplied = jnp.einsum, []

  def counted(equation, a, b, **how):
    sizes = dict(zip(equation.split("->")[0].replace(",", ""), a.shape + b.shape, strict=True))
    jax.debug.callback(lambda: multiplied.append(math.prod(sizes.values())))
    return einsum(equation, a, b, **how)

  monkeypatch.setattr(jnp, "einsum", counted)
  rng, tokens, k, embed, mlp = np.random.default_rng(0), 1024, 2, 4, 3
  x, *matrices = (
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in ((tokens, embed), (experts, embed, mlp), (experts, embed, mlp), (experts, mlp, embed))
  )
  indices, weights = rng.integers(0, experts, (tokens, k)), jnp.ones((tokens, k))
  gradients = jax.grad(
    lambda *arrays: ragged(arrays[0], jnp.asarray(indices), weights, *arrays[1:], indices.size, indices.size)[0].sum(),
    argnums=range(4),
  )
  jax.block_until_ready(gradients(x, *matrices))
  jax.effects_barrier()
  rows = sum(multiplied) / (3 * 3 * embed * mlp)
  block = block_rows(tokens * k, experts)
  padded = (-(-np.bincount(indices.reshape(-1)) // block) * block).sum()
  assert tokens * k <= rows <= padded < 1.5 * tokens * k


def test_compiled_work_does_not_follow_the_groups():
  """XLA counts a loop's body once: what is outside of loops, and a block's product, are as large for more groups."""
  flops = []
  for groups in (8, 64):
    arrays = jax.ShapeDtypeStruct((2048, 32), jnp.float32), jax.ShapeDtypeStruct((groups, 32, 16), jnp.float32)
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
    blocked = functools.partial(grouped_matmul, block=16, implementation="xla")
    flops.append(jax.jit(blocked).lower(*arrays, sizes).compile().cost_analysis()["flops"])
  assert flops[1] < 1.3 * flops[0]
