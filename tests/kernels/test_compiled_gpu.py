"""Every Hopper kernel, compiled for an H200 without a GPU: its machine code, and that no register is spilled.

This does not measure speed.
"""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.kernels.fp8_linear import Recipe, fp8_linear, fp8_ragged_linear
from tests.kernels import gpu_aot
from tests.kernels.marks import NEEDS_JAX_0_11

ROOT = pathlib.Path(__file__).parents[2]
SHARED_BYTES = 232_448  # of a thread block of an H200
pytestmark = [pytest.mark.kernels, NEEDS_JAX_0_11]


def installed(package):
  return any(importlib.metadata.packages_distributions().get(package, ()))


@pytest.fixture(scope="module")
def compiled():
  """name -> the line of gpu_aot for each of its cases."""
  if not installed("triton") or not installed("jax_cuda13_plugin"):
    pytest.skip("the extra gpu-aot is not installed: make kernels")
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  command = [sys.executable, "-m", "tests.kernels.gpu_aot"]
  done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
  assert done.returncode == 0, done.stderr[-3000:]
  return {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}


# Of a thread, of all kernels, as ptxas of CUDA 13.5 says it: most in that for gradients of keys and values.
ATTENTION_SPILLS = {
  "latent": 364, "latent packed": 516, "latent packed, of a part": 252,
  "grouped": 128, "grouped packed": 188, "grouped packed, of a part": 48,
}  # fmt: skip
CASES = gpu_aot.cases() if jax.__version_info__ >= (0, 11) else {}


@pytest.mark.parametrize("name", CASES)
def test_machine_code(compiled, name):
  found, tiles = compiled[name], CASES[name][2]
  assert found["registers"] and not any(found["spilled"]) and not found["LDL"] + found["STL"]
  assert 0 < max(found["shared_bytes"]) <= SHARED_BYTES
  assert found["UTMALDG"] and found["UTMASTG"]
  if tiles is None:
    assert not found["QGMMA"]
    return
  # 64 x n sums are 64 n / 128 for each thread; a block of 128 terms takes four wgmma of 32, and one addition of each
  # sum.
  additions = tiles.n / 2 / 4
  assert found["QGMMA"] % (4 * tiles.waves) == 0 < found["QGMMA"]
  assert found["FFMA"] / found["QGMMA"] == additions
  # By a row's scale and, of two activations, by a column's: of the latter one product more a sum.
  multiplications = found["FMUL"] / found["QGMMA"]
  assert additions <= multiplications < additions + 1 if "wgrad" in name else multiplications < 2.5


def test_machine_code_of_bfloat16_by_group(compiled):
  found = compiled["bfloat16 by group"]
  assert len(found["registers"]) == 3 and found["HGMMA"] and found["UTMALDG"] and found["UTMASTG"]
  assert not any(found["spilled"]) and 0 < max(found["shared_bytes"]) <= SHARED_BYTES


@pytest.mark.parametrize("name", ATTENTION_SPILLS)
def test_attention_s_machine_code(compiled, name):
  """tokamax's: forward, and two kernels backward."""
  if not gpu_aot.tokamax_is_installed():
    pytest.skip("the extra tokamax is not installed: make kernels")
  found = compiled[f"attention {name}"]
  assert len(found["registers"]) == 3 and found["HGMMA"] and found["UTMALDG"] and found["UTMASTG"]
  assert 0 < max(found["shared_bytes"]) <= SHARED_BYTES
  assert max(found["spilled"]) <= ATTENTION_SPILLS[name]


def test_kernels_are_traced_inside_shard_map_and_scan_and_checkpoint():
  """With types of varying arrays checked; interpreted kernels are refused by checkpoint, so that nothing runs."""
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
  recipe = Recipe(implementation="pallas_gpu")

  def loss(x, w, sizes):
    layer = jax.checkpoint(lambda x, w: (fp8_linear(x, w, recipe=recipe)[0], None))
    x, _ = jax.lax.scan(layer, x, w)
    y = fp8_ragged_linear(x, w, group_sizes=sizes, recipe=recipe)[0]
    return jax.lax.psum((y.astype(jnp.float32) ** 2).sum(), "data")

  with jax.set_mesh(mesh):
    by_rows, replicated = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))
    array = jax.ShapeDtypeStruct
    arguments = [
      array((512, 256), jnp.bfloat16, sharding=by_rows),
      array((3, 256, 256), jnp.bfloat16, sharding=replicated),
      array((3,), jnp.int32, sharding=replicated),
    ]
    sharded = jax.shard_map(loss, in_specs=(jax.P("data"), jax.P(), jax.P()), out_specs=jax.P())
    lowered = jax.jit(jax.grad(sharded, argnums=(0, 1))).trace(*arguments).lower(lowering_platforms=("cuda",))
  calls = lowered.as_text().count("custom_call @mosaic_gpu")
  # Of each layer: quantization of x and w and a GEMM; quantization of dy and two GEMMs; x and w once more under
  # checkpoint.
  assert calls == 6 + 6 + 2, calls
