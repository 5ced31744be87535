"""Finds the tiles of the Hopper kernels' products on the GPU at hand:  python -m benchmarks.tune_kernels

Times each way to cut each product of benchmarks/fp8_matmul.py and writes the best to deepseek_jax/kernels/tiles.json, after
each product: what a run does not reach in --seconds the next one goes on with. --again times anew what the table has. --small:
one small product, interpreted.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import time

from absl import flags

from benchmarks import fp8_matmul
from deepseek_jax.flags import parse, run_program

BANDS = (4, 8, 16)


def main(argv) -> int:
  values = flags.FlagValues()
  flags.DEFINE_float("seconds", 540, "after which no product is started", flag_values=values)
  flags.DEFINE_string("table", "deepseek_jax/kernels/tiles.json", "file to extend", flag_values=values)
  flags.DEFINE_bool("again", False, "also products that the table has", flag_values=values)
  flags.DEFINE_bool("small", False, "one small product, interpreted", flag_values=values)
  parse(argv, values, __doc__)
  path, started = pathlib.Path(values.table), time.monotonic()

  import jax

  from deepseek_jax.kernels.implementations import device_kind

  chip, interpreted = device_kind(), contextlib.nullcontext()
  if values.small:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    interpreted = plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams())
  table = json.loads(path.read_text()) if path.exists() else {}
  for operation, key, work, make in products(values.small):
    of_chip = table.setdefault(operation, {}).setdefault(chip, {})
    if key in of_chip and not values.again:
      continue
    if time.monotonic() - started > values.seconds:
      print(f"{operation} {key}: not reached; run again")
      continue
    with interpreted:
      seconds = measured(operation, make, values.small)
    if not seconds:
      print(f"{operation} {key}: nothing ran")
      continue
    best = min(seconds, key=seconds.get)
    of_chip[key] = dataclasses.asdict(best)
    replace(path, json.dumps(table, indent=1, sort_keys=True) + "\n")
    print(
      f"{operation} {key}: {best}, {work / seconds[best] / 1e12:.4g} TFLOP/s on {chip}, jax {jax.__version__}",
      flush=True,
    )
  return 0


def measured(operation, make, small):
  """Tiles -> seconds a call, of those that compile and run."""
  import jax

  from deepseek_jax.kernels.tiles import CANDIDATES

  candidates = CANDIDATES["fp8_wgrad" if "wgrad" in operation else "fp8_matmul"]
  seconds = {}
  try:
    function, arguments = make()
  except Exception as e:  # of this product; the others may still fit in memory
    print(f"  {fp8_matmul.told(e)}", flush=True)
    return seconds

  def measure(tiles):
    try:
      call = jax.jit(functools.partial(function, tiles=tiles))
      how = {"least": 0, "rounds": 1} if small else {"least": 0.02}
      seconds[tiles] = fp8_matmul.seconds_a_call(call, arguments, jax.block_until_ready, **how)
    except Exception as e:  # one way to cut fails, and the others are still to be timed
      print(f"  {tiles}: {fp8_matmul.told(e)}", flush=True)

  for tiles in candidates[:2] if small else candidates:
    measure(tiles)
  if seconds and not small:  # bands matter less: of the best alone
    best = min(seconds, key=seconds.get)
    for band in set(BANDS) - {best.band}:
      measure(dataclasses.replace(best, band=band))
  return seconds


def products(small):
  """(operation, key in the table, FLOPs, () -> (function of operands and tiles, arguments)) of every product."""
  import jax.numpy as jnp

  from deepseek_jax.kernels.fp8_grouped_matmul import pallas_gpu as grouped
  from deepseek_jax.kernels.fp8_matmul import pallas_gpu as dense
  from deepseek_jax.kernels.tiles import key

  def operands(make, function, **how):
    return lambda: (functools.partial(function, **how), make()["ours"][1])

  if small:
    make = functools.partial(fp8_matmul.dense, 128, 128, 128, "xla")
    yield (
      "fp8_matmul",
      key(jnp.bfloat16, 128, 128, 128, 1),
      2 * 128**3,
      operands(make, dense.matmul, out_dtype=jnp.bfloat16),
    )
    return
  for (m, n, k), wgrad in [
    *zip(fp8_matmul.DENSE, itertools.repeat(False)),
    *zip(fp8_matmul.WGRAD, itertools.repeat(True)),
  ]:
    make = functools.partial(fp8_matmul.dense, m, n, k, "xla", wgrad=wgrad)
    out = jnp.float32 if wgrad else jnp.bfloat16
    operation = "fp8_wgrad" if wgrad else "fp8_matmul"
    yield operation, key(out, m, n, k, 1), 2 * m * n * k, operands(make, dense.matmul, out_dtype=out)
  for groups, m, n, k in fp8_matmul.GROUPED:
    work, step = 2 * groups * m * n * k, {"step": 128}
    make = functools.partial(fp8_matmul.grouped, groups, m, n, k, "xla")
    found = operands(make, grouped.matmul, **step, out_dtype=jnp.bfloat16)
    yield "fp8_grouped_matmul", key(jnp.bfloat16, groups * m, n, k, groups), work, found
    make = functools.partial(fp8_matmul.grouped_wgrad, groups, m, n, k, "xla")
    found = operands(make, grouped.wgrad, **step, out_dtype=jnp.float32)
    yield "fp8_grouped_wgrad", key(jnp.float32, groups * k, n, groups * m, groups), work, found


def replace(path, text):
  """Writes a file at once: a run that is cut off leaves the one before."""
  part = path.with_suffix(".part")
  part.write_text(text)
  os.replace(part, path)


if __name__ == "__main__":
  run_program(main)
