"""Finds the tiles of the Hopper kernels' products on the GPU at hand:  python -m benchmarks.tune_kernels

Times each way to cut each product of benchmarks/fp8_matmul.py and writes the best to deepseek_jax/kernels/tiles.json, after
each product: what a run does not reach in --seconds the next one goes on with. --again times anew what the table has.
--json=FILE keeps every time. A product that takes longer than --row_seconds has failed, and ends the program. Exit codes: 0;
1 if of a product nothing ran; 3 if products are left. --small: one small product, interpreted.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Callable

from absl import flags

from benchmarks import fp8_matmul
from benchmarks.results import Results, one_line, write_json
from benchmarks.timing import seconds_a_call
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import parse, run_program

BANDS = (4, 8, 16)


def main(argv) -> int:
  values = flags.FlagValues()
  flags.DEFINE_float("seconds", 540, "after which no product is started", flag_values=values)
  flags.DEFINE_float("row_seconds", 120, "after which a product has failed", flag_values=values)
  flags.DEFINE_string("table", "deepseek_jax/kernels/tiles.json", "file to extend", flag_values=values)
  flags.DEFINE_string("json", None, "file of all times", flag_values=values)
  flags.DEFINE_bool("again", False, "also products that the table has", flag_values=values)
  flags.DEFINE_bool("small", False, "one small product, interpreted", flag_values=values)
  parse(argv, values, __doc__)
  path = pathlib.Path(values.table)

  import jax

  from deepseek_jax.kernels.implementations import device_kind

  if jax.__version_info__ < (0, 11):
    raise ConfigError(
      f"kernels for GPUs need jax 0.11 or newer, and this is jax {jax.__version__}: install a newer one"
    )
  chip = device_kind()
  results = Results(values.json, {"chip": chip, "jax": jax.__version__, "small": values.small}, values.row_seconds)
  table = json.loads(path.read_text()) if path.exists() else {}
  known = lambda p: p.key in table.get(p.operation, {}).get(chip, {})
  wanted = {p.label: p for p in products(values.small) if values.again or not known(p)}

  def measure(name):
    product = wanted[name]
    row = fastest(product, values.small)
    table.setdefault(product.operation, {}).setdefault(chip, {})[product.key] = row["tiles"]
    write_json(path, table, sort_keys=True)
    return row

  def show(row):
    print(f"{row['name']}: {row.get('failure') or described(row)} on {chip}, jax {jax.__version__}", flush=True)

  return results.run(wanted, measure, show, values.seconds)


@dataclasses.dataclass(frozen=True)
class Product:
  """`operation` and `key`: where tiles.json has its tiles; `name`: that of its row in fp8_matmul; `work`: FLOPs;
  make() gives (function of operands and tiles, arguments)."""

  operation: str
  key: str
  name: str
  work: float
  make: Callable

  @property
  def label(self):
    return f"{self.operation} {self.key}"


def described(row):
  """The best way to cut a product, and its rate."""
  from deepseek_jax.kernels.tiles import Tiles

  return f"{Tiles(**row['tiles'])}, {row['rate']:.4g} TFLOP/s"


def fastest(product, small) -> dict:
  """{"tiles": fields of the fastest, "rate": in TFLOP/s, "product": name of its row in fp8_matmul, "seconds": {tiles: a call}}.

  Raises RuntimeError where nothing ran.
  """
  seconds = measured(product.make, product.operation, small)
  if not seconds:
    raise RuntimeError("nothing ran")
  best = min(seconds, key=seconds.get)
  return {
    "product": product.name, "tiles": dataclasses.asdict(best), "rate": product.work / seconds[best] / 1e12,
    "seconds": {str(tiles): time for tiles, time in seconds.items()},
  }  # fmt: skip


def measured(make, operation, small):
  """Tiles -> seconds a call, of those that compile and run."""
  import jax

  from deepseek_jax.kernels.tiles import CANDIDATES

  candidates = CANDIDATES["fp8_wgrad" if "wgrad" in operation else "fp8_matmul"]
  (function, arguments), seconds = make(), {}

  def compiled(tiles):
    """The call, or None: one way to cut fails, and the others are still to be timed."""
    try:
      with interpreted(small):
        return jax.jit(functools.partial(function, tiles=tiles)).lower(*arguments[0]).compile()
    except Exception as e:
      print(f"  {tiles}: {one_line(e)}", flush=True)

  def measure(ways):
    # Compiled side by side: that is most of the time, and one core's work each.
    with concurrent.futures.ThreadPoolExecutor(1 if small else os.cpu_count()) as pool:
      calls = list(pool.map(compiled, ways))
    for tiles, call in zip(ways, calls, strict=True):
      try:
        how = {"least": 0, "rounds": 1} if small else {"least": 0.02}
        seconds.update({tiles: seconds_a_call(call, arguments, jax.block_until_ready, **how)} if call else {})
      except Exception as e:
        print(f"  {tiles}: {one_line(e)}", flush=True)

  measure(candidates[:2] if small else candidates)
  if seconds and not small:  # bands matter less: of the best alone
    best = min(seconds, key=seconds.get)
    measure([dataclasses.replace(best, band=band) for band in BANDS if band != best.band])
  return seconds


def interpreted(small):
  """Where kernels for GPUs are interpreted on a CPU, if `small`."""
  if not small:
    return contextlib.nullcontext()
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams())


def products(small):
  """Every Product."""
  import jax.numpy as jnp

  from deepseek_jax.kernels.fp8_grouped_matmul import pallas_gpu as grouped
  from deepseek_jax.kernels.fp8_matmul import pallas_gpu as dense
  from deepseek_jax.kernels.tiles import key

  def operands(make, function, **how):
    return lambda: (functools.partial(function, **how), make()["ours"][1])

  if small:
    make = functools.partial(fp8_matmul.dense, 128, 128, 128, "xla")
    found = operands(make, dense.matmul, out_dtype=jnp.bfloat16)
    yield Product("fp8_matmul", key(jnp.bfloat16, 128, 128, 128, 1), "small", 2 * 128**3, found)
    return
  for (m, n, k), wgrad in [
    *zip(fp8_matmul.DENSE, itertools.repeat(False)),
    *zip(fp8_matmul.WGRAD, itertools.repeat(True)),
  ]:
    make = functools.partial(fp8_matmul.dense, m, n, k, "xla", wgrad=wgrad)
    out, kind = (jnp.float32, "wgrad") if wgrad else (jnp.bfloat16, "forward or dgrad")
    operation, found = "fp8_wgrad" if wgrad else "fp8_matmul", operands(make, dense.matmul, out_dtype=out)
    yield Product(operation, key(out, m, n, k, 1), f"{kind} {m} x {n} x {k}", 2 * m * n * k, found)
  for groups, m, n, k in fp8_matmul.GROUPED:
    work, step, sizes = 2 * groups * m * n * k, {"step": 128}, f"{groups} x {m} x {n} x {k}"
    make = functools.partial(fp8_matmul.grouped, groups, m, n, k, "xla")
    found, of = operands(make, grouped.matmul, **step, out_dtype=jnp.bfloat16), (groups * m, n, k, groups)
    yield Product("fp8_grouped_matmul", key(jnp.bfloat16, *of), f"grouped {sizes}", work, found)
    make = functools.partial(fp8_matmul.grouped_wgrad, groups, m, n, k, "xla")
    found, of = operands(make, grouped.wgrad, **step, out_dtype=jnp.float32), (groups * k, n, groups * m, groups)
    yield Product("fp8_grouped_wgrad", key(jnp.float32, *of), f"grouped wgrad {sizes}", work, found)


if __name__ == "__main__":
  run_program(main)
