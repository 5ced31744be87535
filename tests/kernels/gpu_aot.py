"""Compiles every kernel for an NVIDIA H200 ahead of time, without a GPU: one line of JSON for each case.

Runs in a process of its own. The CUDA plugin of jax compiles for a described device; ptxas and nvdisasm come from
wheels. Mosaic dumps what they print.
"""

import functools
import json
import os
import pathlib
import re
import site
import sys
import tempfile

# What XLA would query from the device.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150754820096 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H200"
"""
INSTRUCTIONS = ("QGMMA", "HGMMA", "FFMA", "FMUL", "LDL", "STL", "UTMALDG", "UTMASTG")


def install_tools(folder):
  """`folder`/bin with ptxas and nvdisasm, where Mosaic looks for them; the wheels are of the extra gpu-aot."""
  packages = pathlib.Path(site.getsitepackages()[0])
  (folder / "bin").mkdir()
  for program in ("nvidia/cu13/bin/ptxas", "triton/backends/nvidia/bin/nvdisasm"):
    if not (packages / program).exists():
      raise FileNotFoundError(f"no {program} in {packages}: install the extra gpu-aot of pyproject.toml")
    (folder / "bin" / pathlib.Path(program).name).symlink_to(packages / program)


def read_dump(dump):
  """What the compilation's files say: registers and spilled bytes of ptxas, shared memory, instructions by name."""
  read = lambda pattern: "".join(path.read_text() for path in sorted(dump.glob(pattern)))
  ptxas, sass, resources = read("*.ptxas"), read("*.sass*"), read("*.resources.txt")
  numbers = lambda pattern, text: [int(n) for n in re.findall(pattern, text)]
  return {
    "registers": numbers(r"Used (\d+) registers", ptxas),
    "spilled": numbers(r"(\d+) bytes spill (?:stores|loads)", ptxas),
    "shared_bytes": numbers(r"smem_scratch_bytes=(\d+)", resources),
    **{name: len(re.findall(rf"\b{name}\b", sass)) for name in INSTRUCTIONS},
  }


def cases():
  """name -> (function, arguments, tile config or None): every kernel, and GEMMs in every tile config."""
  import jax
  import jax.numpy as jnp

  from deepseek_jax.kernels.fp8_grouped_matmul import pallas_gpu as grouped
  from deepseek_jax.kernels.fp8_matmul import pallas_gpu as dense
  from deepseek_jax.kernels.qtensor import FP8, QTensor, tile_counts
  from deepseek_jax.kernels.quantize import pallas_gpu as quantizers
  from deepseek_jax.kernels.swiglu import pallas_gpu as swiglu
  from deepseek_jax.kernels.tiles import CANDIDATES

  def fp8_operand(tile, *shape):
    return QTensor(array(shape, FP8), array((*shape[:-2], *tile_counts(shape, tile)), jnp.float32), tile)

  array = jax.ShapeDtypeStruct
  rows, square = (1, 128), (128, 128)
  a, b, matrices = fp8_operand(rows, 4096, 7168), fp8_operand(square, 7168, 7168), fp8_operand(square, 8, 7168, 7168)
  x, w, sizes = array((4096, 7168), jnp.bfloat16), array((8, 2048, 7168), jnp.float32), array((8,), jnp.int32)
  found = {
    "quantize rows": (lambda x: quantizers.quantize(x, rows, False), [x], None),
    "quantize squares": (lambda w: quantizers.quantize(w, square, True), [w], None),
    "quantize both": (lambda x: quantizers.quantize_both(x, 128, False), [x], None),
    "swiglu": (lambda gate, up: swiglu.swiglu_quantize(gate, up, 128, False), [x, x], None),
  }
  for tiles in CANDIDATES["fp8_matmul"]:
    for dtype in (jnp.bfloat16, jnp.float32):
      name = f"{jnp.dtype(dtype)} {tiles}"
      found[f"dense {name}"] = (functools.partial(dense.matmul, out_dtype=dtype, tiles=tiles), [a, b], tiles)
      product = functools.partial(grouped.matmul, step=128, out_dtype=dtype, tiles=tiles)
      found[f"grouped {name}"] = (product, [a, matrices, sizes], tiles)
  for tiles in CANDIDATES["fp8_wgrad"]:
    product = functools.partial(dense.matmul, out_dtype=jnp.float32, tiles=tiles)
    found[f"dense wgrad {tiles}"] = (product, [a, a], tiles)
    product = functools.partial(grouped.wgrad, step=128, out_dtype=jnp.float32, tiles=tiles)
    found[f"grouped wgrad {tiles}"] = (product, [a, a, sizes], tiles)
  return found


def grouped_cases():
  """jax's grouped matmul of bfloat16, forward and both gradients."""
  import jax
  import jax.numpy as jnp

  from deepseek_jax.kernels.grouped_matmul.api import grouped_matmul

  def gradients(x, w, dy, sizes):
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, block=1, implementation="pallas_gpu"), x, w)
    return y, pull(dy)

  shapes = ((32768, 7168), (8, 7168, 4096), (32768, 4096))
  arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
  return {"bfloat16 by group": (gradients, [*arrays, jax.ShapeDtypeStruct((8,), jnp.int32)], None)}


def tokamax_is_installed():
  from deepseek_jax.kernels.attention import pallas_gpu

  return pallas_gpu.installed_tokamax() == pallas_gpu.TOKAMAX_VERSION


def attention_cases():
  """tokamax's kernels as models call them: latent and grouped attention, packed or not, and a part of a sequence."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from deepseek_jax.kernels.attention import pallas_gpu

  array = jax.ShapeDtypeStruct
  positions = np.arange(4096, dtype=np.int32).reshape(2, 2048)

  def full(segments, *arrays):
    return pallas_gpu.attention(*arrays, segments, 0.1, 0)

  def part(segments, q, k, v):
    return pallas_gpu.attention_of_part(q[:, :2048], k, v, (segments[:, :2048], segments), 0.1, 0, positions, 0)

  def gradients(attention, segments, *arrays):
    y, pull = jax.vjp(functools.partial(attention, segments), *arrays)
    return y, pull(y)

  found = {}
  for name, (heads, kv_heads, key) in {"latent": (16, 16, 192), "grouped": (16, 4, 128)}.items():
    arrays = [array((2, 4096, h, w), jnp.bfloat16) for h, w in ((heads, key), (kv_heads, key), (kv_heads, 128))]
    segments = array((2, 4096), jnp.int32)
    for variant, attention, ids in (
      ("", full, None),
      (" packed", full, segments),
      (" packed, of a part", part, segments),
    ):
      found[f"attention {name}{variant}"] = (functools.partial(gradients, attention), [ids, *arrays], None)
  return found


def main():
  folder = pathlib.Path(tempfile.mkdtemp())
  install_tools(folder)
  os.environ |= {
    "CUDA_ROOT": str(folder),
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "MOSAIC_GPU_DUMP_TO": str(folder / "dump"),
  }
  os.environ |= {f"MOSAIC_GPU_DUMP_{what}": "1" for what in ("PTXAS", "SASS", "RESOURCES")}
  os.environ.pop("JAX_PLATFORMS", None)

  import jax
  from jax.experimental import topologies

  topology = topologies.get_topology_desc(platform="cuda", topology_name="h200", target_config=H200, topology="1x1x1")
  sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
  found = cases() | grouped_cases() | (attention_cases() if tokamax_is_installed() else {})
  for name, (function, arguments, _) in found.items():
    if sys.argv[1:] and not re.search(sys.argv[1], name):
      continue
    (folder / "dump").mkdir(exist_ok=True)
    for path in (folder / "dump").iterdir():
      path.unlink()
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
    jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
    print(json.dumps({"name": name, **read_dump(folder / "dump")}), flush=True)


if __name__ == "__main__":
  main()
