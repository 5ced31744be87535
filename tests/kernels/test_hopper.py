"""What the Hopper kernels share: the order of tiles, every tile config, and that the detector finds a race."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice

from deepseek_jax.flags import load_config
from deepseek_jax.kernels import hopper
from deepseek_jax.kernels.fp8_grouped_matmul import pallas_gpu as grouped
from deepseek_jax.kernels.fp8_grouped_matmul import reference as grouped_reference
from deepseek_jax.kernels.fp8_matmul import pallas_gpu as dense
from deepseek_jax.kernels.fp8_matmul import reference, supports
from deepseek_jax.kernels.implementations import Unsupported
from deepseek_jax.kernels.qtensor import with_unit_scales
from deepseek_jax.kernels.quantize.xla import quantize
from deepseek_jax.kernels.tiles import CANDIDATES, TileConfig
from deepseek_jax.mesh import abstract_mesh
from deepseek_jax.training.step import abstract_step
from tests.kernels.marks import NEEDS_JAX_0_11

M, N, K = 328, 320, 400  # partial tiles everywhere


def operand(rows, columns, tile=(1, 128), leading=()):
  values = np.random.default_rng(rows + columns).standard_normal((*leading, rows, columns))
  return quantize(jnp.asarray(values, jnp.float32), tile, False)


def assert_close(ours, exact):
  assert ours.shape == exact.shape and ours.dtype == exact.dtype
  assert np.linalg.norm(np.asarray(ours) - exact) < 1e-6 * np.linalg.norm(exact)


@pytest.mark.parametrize(("down", "across", "band"), [(1, 1, 8), (7, 3, 4), (8, 5, 4), (16, 2, 16)])
def test_bands_hold_every_tile_once(down, across, band):
  row, column = hopper.banded_order(jnp.arange(down * across), down, across, band)
  assert sorted(zip(row.tolist(), column.tolist(), strict=True)) == [(i, j) for i in range(down) for j in range(across)]
  assert (np.asarray(row)[: min(band, down) * across] < band).all()


@pytest.mark.parametrize("tile", [128, 256])
@pytest.mark.parametrize("seed", range(4))
def test_row_tiles_hold_every_row_once(tile, seed):
  rng = np.random.default_rng(seed)
  rows, groups = 2048, int(rng.integers(1, 40))
  sizes = np.diff(np.sort(rng.integers(0, rows + 1, groups + 1))) * rng.integers(0, 2, groups)
  (total,), (group, row, start, end) = map(
    np.asarray, grouped._group_row_tiles(jnp.asarray(sizes, jnp.int32), rows, tile)
  )
  assert total <= group.size and (row % hopper.ROW_ALIGNMENT == 0).all()
  visits, ends = np.zeros(rows, int), np.append(np.cumsum(sizes), rows)
  for g, first, low, high in zip(group[:total], row, start, end, strict=False):
    begin, stop = max(first, low), min(first + tile, high)
    visits[begin:stop] += 1
    assert stop > begin and np.all(np.searchsorted(ends, np.arange(begin, stop), side="right") == g)
  assert (visits == 1).all()


@pytest.mark.parametrize(
  ("a", "b", "dtype", "message"),
  [
    (operand(8, 256, (1, 64)), operand(8, 256, (64, 64)), "float32", r"a: .* tiles of 1 x 128, .*\(8, 256\) in tiles of 1 x 64"),
    (operand(8, 256), operand(8, 256, (64, 128)), "float32", "b: .* tiles of 1 or 128 x 128, .* in tiles of 64 x 128"),
    (with_unit_scales(jnp.ones((8, 256)), (1, 128)), operand(8, 256), "float32", "a: .* float8_e4m3fn .* and this is float32"),
    (operand(8, 256), operand(8, 256), "float16", "float32 and bfloat16, not float16"),
  ],
)  # fmt: skip
def test_unsupported_operands_are_named(a, b, dtype, message):
  support = supports.pallas_gpu("matmul", a, b, jnp.dtype(dtype))
  assert not support and re.search(message, support.reason)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="this jax is new enough")
def test_an_old_jax_is_named():
  with pytest.raises(Unsupported, match=f"jax 0.11 or newer, and this is {jax.__version__}"):
    dense.matmul(operand(8, 256), operand(8, 256), jnp.float32)


@pytest.mark.kernels
@pytest.mark.parametrize("tiles", CANDIDATES["fp8_matmul"], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gemms_in_every_tile_config(tiles, dtype, on_gpu):
  a, b, matrices = operand(M, K), operand(N, K, (128, 128)), operand(N, K, (128, 128), (3,))
  sizes = jnp.asarray([130, 0, 151], jnp.int32)
  ours = jax.jit(lambda a, b: dense.matmul(a, b, dtype, tiles))(a, b)
  grouped_result = jax.jit(lambda *args: grouped.matmul(*args, 128, dtype, tiles))(a, matrices, sizes)
  exact = reference.matmul(a, b, jnp.float32), grouped_reference.matmul(a, matrices, sizes, 128, jnp.float32)
  for actual, expected in zip((ours, grouped_result), exact, strict=True):
    if dtype == jnp.float32:
      assert_close(actual, expected)
    else:  # rounded once: half a unit of 8 bits
      np.testing.assert_allclose(*map(np.float32, (actual, expected)), rtol=2**-8, atol=1e-4)


@pytest.mark.kernels
@pytest.mark.parametrize("tiles", CANDIDATES["fp8_wgrad"], ids=str)
def test_weight_gradients_in_every_tile_config(tiles, on_gpu):
  a, b, sizes = operand(M, K), operand(N, K), jnp.asarray([130, 0, 151], jnp.int32)
  ours = jax.jit(lambda a, b: dense.matmul(a, b, jnp.float32, tiles))(a, b)
  grouped_result = jax.jit(lambda *args: grouped.wgrad(*args, 128, jnp.float32, tiles))(a, b, sizes)
  assert_close(ours, reference.matmul(a, b, jnp.float32))
  assert_close(grouped_result, grouped_reference.wgrad(a, b, sizes, 128, jnp.float32))


@pytest.mark.kernels
def test_a_missing_fence_is_found(monkeypatch, on_gpu, capsys):
  """Without the commit after the scales are read, the next copy into their stage races with the reads."""
  commit = hopper.plgpu.commit_smem
  monkeypatch.setattr(hopper.plgpu, "commit_smem", lambda: sys._getframe(1).f_code.co_name == "multiply" or commit())
  a, b = operand(128, 128 * 8), operand(64, 128 * 8)
  try:
    jax.block_until_ready(jax.jit(lambda a, b: dense.matmul(a, b, jnp.float32, TileConfig(n=64)))(a, b))
  except jax.errors.JaxRuntimeError as error:  # so jax 0.12
    assert "RACE DETECTED" in str(error)
  else:
    assert "RACE DETECTED" in capsys.readouterr().out


@NEEDS_JAX_0_11
@pytest.mark.kernels
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_training_step_is_traced_for_hopper_without_a_gpu(precision):
  """In widths that its kernels do: experts' three products forward, again for the backward pass, and six gradients."""
  fields = {
    "model.compute_dtype": "bfloat16",
    "model.embed": "128",
    "model.moe.mlp": "128",
    "mesh.data": "1",
    "mesh.fsdp": "2",
  }
  config = load_config("configs/tiny.py", {**fields, "mesh.expert": "2", "model.precision": precision})
  mesh = abstract_mesh(config.mesh, AbstractDevice("NVIDIA H200", 132, "gpu"))
  with jax.sharding.use_abstract_mesh(mesh):
    step, arguments = abstract_step(config, mesh)
    text = str(jax.jit(step, donate_argnums=0).trace(*arguments).jaxpr)
  assert text.count("mpmd_map") >= 12
