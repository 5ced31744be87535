"""How many bundles, instructions of a TPU's cores, a step of each kernel is: what libtpu says without a TPU.

  python -m tests.kernels.bundles      writes bundles.json anew for the libtpu that is installed: about ten minutes
  python -m tests.kernels.bundles v5p  prints the counts for one chip

They are counted once where they loop. Not time: there is no memory in them, and some take more than a cycle.
"""

import functools
import glob
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

TABLE = pathlib.Path(__file__).with_name("bundles.json")
TOPOLOGIES = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
ROWS, COLUMNS, K = 256, 512, 1024  # a step of the products


def counts(chip) -> dict[str, int]:
  """{kernel: bundles}, in a process of its own: libtpu reads where to write them when it is loaded."""
  from deepseek_jax.plan.topology import COMPILER_ENVIRONMENT

  with tempfile.TemporaryDirectory() as folder:
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    environment = (
      os.environ | COMPILER_ENVIRONMENT | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    )
    done = subprocess.run(
      [sys.executable, "-m", "tests.kernels.bundles", chip, folder], env=environment, capture_output=True, text=True
    )
  if done.returncode:
    raise RuntimeError(f"{chip}: {done.stderr[-3000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def cases():
  """{name: (function, arguments)}"""
  import jax
  import jax.numpy as jnp

  from deepseek_jax.kernels.fp8_grouped_matmul import pallas_tpu as grouped
  from deepseek_jax.kernels.fp8_matmul import pallas_tpu as dense
  from deepseek_jax.kernels.qtensor import QTensor
  from deepseek_jax.kernels.quantize import pallas_tpu as quantizers
  from deepseek_jax.kernels.swiglu import pallas_tpu as swiglu

  abstract = jax.ShapeDtypeStruct

  def operand(block, *shape, square=False):
    tile = (block if square else 1, block)
    scales = (*shape[:-2], -(-shape[-2] // tile[0]), shape[-1] // block)
    return QTensor(abstract(shape, jnp.float8_e4m3fn), abstract(scales, jnp.float32), tile)

  found = {"bf16": (bf16_matmul, [abstract((n, K), jnp.bfloat16) for n in (ROWS, 2 * COLUMNS)])}
  sizes = abstract((4,), jnp.int32)
  for block in (128, 256, 512):
    x, w = operand(block, ROWS, K), operand(block, 2 * COLUMNS, K, square=True)
    found[f"matmul {block}"] = lambda a, b: dense.matmul(a, b, jnp.bfloat16), [x, w]
    found[f"wgrad {block}"] = lambda a, b: dense.matmul(a, b, jnp.float32), [x, operand(block, 2 * COLUMNS, K)]
    found[f"grouped matmul {block}"] = (
      lambda a, b, sizes: grouped.matmul(a, b, sizes, 128, jnp.bfloat16),
      [operand(block, 4 * ROWS, K), operand(block, 4, COLUMNS, K, square=True), sizes],
    )
    found[f"grouped wgrad {block}"] = (
      lambda a, b, sizes: grouped.wgrad(a, b, sizes, 128, jnp.float32),
      [x, operand(block, 2 * COLUMNS, K), sizes],
    )
  x = abstract((1024, 1024), jnp.bfloat16)
  found["quantize (1, 128)"] = lambda x: quantizers.quantize(x, (1, 128), False), [x]
  found["quantize (128, 128)"] = lambda x: quantizers.quantize(x, (128, 128), False), [x]
  found["quantize both"] = lambda x: quantizers.quantize_both(x, 128, False), [x]
  found["quantize both pow2_scales"] = lambda x: quantizers.quantize_both(x, 128, True), [x]
  found["swiglu"] = lambda gate, up: swiglu.swiglu_quantize(gate, up, 128, False), [x, x]
  return found


def bf16_matmul(a, b):
  """What the products are compared with: the same step, without scales."""
  import jax
  import jax.numpy as jnp
  from jax.experimental import pallas as pl

  def kernel(a, b, y):
    y[...] = jax.lax.dot_general(a[...], b[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32).astype(
      y.dtype
    )

  return pl.pallas_call(
    kernel,
    grid=(2,),
    in_specs=[pl.BlockSpec((ROWS, K), lambda j: (0, 0)), pl.BlockSpec((COLUMNS, K), lambda j: (j, 0))],
    out_specs=pl.BlockSpec((ROWS, COLUMNS), lambda j: (0, j)),
    out_shape=jax.ShapeDtypeStruct((ROWS, 2 * COLUMNS), jnp.bfloat16),
    name="plain",
  )(a, b)


def compiled_here(chip, folder):
  """As `counts`, in the process that libtpu was told to write into `folder`."""
  import jax
  from jax.experimental import topologies

  device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
  placed = functools.partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(device))
  found, known = {}, set()
  described = jax.sharding.AbstractDevice(device.device_kind, 1, "tpu")
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=described)):
    for name, (function, arguments) in cases().items():
      arguments = jax.tree.map(lambda a: placed(a.shape, a.dtype), arguments)
      jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
      files = set(glob.glob(f"{folder}/*schedule-analysis_final_bundles.txt"))
      (path,) = (path for path in files - known if re.search(r"/\d+-(plain|fp8_\w+|quantize)[.\d]*-\d+-sch", path))
      text = pathlib.Path(path).read_text()
      found[name], known = int(text.split("total scheduled bundles:")[1].split()[0]), files
  return found


def libtpu():
  return importlib.metadata.version("libtpu")


if __name__ == "__main__":
  if len(sys.argv) == 3:
    print(json.dumps(compiled_here(*sys.argv[1:])))
  elif len(sys.argv) == 2:
    print(json.dumps(counts(sys.argv[1]), indent=2))
  else:
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table[libtpu()] = {chip: counts(chip) for chip in TOPOLOGIES}
    TABLE.write_text(json.dumps(table, indent=2) + "\n")
