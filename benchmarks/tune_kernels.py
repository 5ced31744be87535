"""Tunes the tiles of the Hopper kernels' GEMMs on this machine's GPU:  python -m benchmarks.tune_kernels

Times the candidate tiles of each GEMM of benchmarks/fp8_matmul.py and writes the fastest to
deepseek_jax/kernels/tiles.json, after each GEMM: the next run continues with those that were not reached in --seconds.
--again also times GEMMs that the file has. --json=FILE saves every time. A GEMM that takes longer than --row_seconds
has failed, and ends the program. Exit codes: 0; 1 if no tiles of a GEMM ran; 3 if GEMMs remain. --small: one small
GEMM, interpreted.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from benchmarks import fp8_matmul
from benchmarks.results import Results, write_json
from benchmarks.timing import Calls
from deepseek_jax.errors import ConfigError, format_exception
from deepseek_jax.flags import parse, run_program
from deepseek_jax.selftest.timing import seconds_per_call

if TYPE_CHECKING:  # jax is imported after the flags are parsed
  from deepseek_jax.kernels.tiles import TileConfig

BANDS = (4, 8, 16)


def main(argv: list[str]) -> int:
  values = flags.FlagValues()
  flags.DEFINE_float("seconds", 540, "after this time no GEMM starts", flag_values=values)
  flags.DEFINE_float("row_seconds", 120, "a GEMM that takes longer has failed", flag_values=values)
  flags.DEFINE_string("table", "deepseek_jax/kernels/tiles.json", "file of tiles to extend", flag_values=values)
  flags.DEFINE_string("json", None, "file of all times", flag_values=values)
  flags.DEFINE_bool("again", False, "also GEMMs that the file has", flag_values=values)
  flags.DEFINE_bool("small", False, "one small GEMM, interpreted", flag_values=values)
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

  def is_tuned(gemm):
    return gemm.key in table.get(gemm.operation, {}).get(chip, {})

  to_tune = {gemm.label: gemm for gemm in gemms(values.small) if values.again or not is_tuned(gemm)}

  def measure(name):
    gemm = to_tune[name]
    row = tune(gemm, values.small)
    table.setdefault(gemm.operation, {}).setdefault(chip, {})[gemm.key] = row["tiles"]
    write_json(path, table, sort_keys=True)
    return row

  def show(row):
    print(f"{row['name']}: {row.get('failure') or format_best(row)} on {chip}, jax {jax.__version__}", flush=True)

  return results.run(to_tune, measure, show, values.seconds)


@dataclasses.dataclass(frozen=True)
class Gemm:
  """A GEMM to tune. tiles.json has its tiles under `operation` and `key`."""

  operation: str
  key: str
  name: str  # of its row in fp8_matmul
  flops: float
  make_call: Callable[[], tuple[Callable, list[tuple]]]  # () -> (function of operands and `tiles`, list of operands)

  @property
  def label(self) -> str:
    return f"{self.operation} {self.key}"


def format_best(row: dict[str, Any]) -> str:
  """The fastest tiles of a row, and their rate."""
  from deepseek_jax.kernels.tiles import TileConfig

  return f"{TileConfig(**row['tiles'])}, {row['rate']:.4g} TFLOP/s"


def tune(gemm: Gemm, small: bool) -> dict[str, Any]:
  """Times the candidate tiles of a GEMM.

  Returns:
    {"tiles": fields of the fastest, "rate": TFLOP/s, "product": the GEMM's name, "seconds": {tiles: seconds per call}}.

  Raises:
    RuntimeError: no tiles ran.
  """
  seconds = time_candidates(gemm, small)
  if not seconds:
    raise RuntimeError("no tiles ran")
  best = min(seconds, key=seconds.get)
  return {
    "product": gemm.name, "tiles": dataclasses.asdict(best), "rate": gemm.flops / seconds[best] / 1e12,
    "seconds": {str(tiles): time for tiles, time in seconds.items()},
  }  # fmt: skip


def time_candidates(gemm: Gemm, small: bool) -> dict[TileConfig, float]:
  """{tiles: seconds per call} of the candidates that compile and run."""
  import jax

  from deepseek_jax.kernels.tiles import CANDIDATES

  candidates = CANDIDATES["fp8_wgrad" if "wgrad" in gemm.operation else "fp8_matmul"]
  function, arguments = gemm.make_call()
  seconds: dict[TileConfig, float] = {}

  def compile_tiles(tiles):
    """The compiled function, or None if it does not compile: the others are still timed."""
    try:
      with interpret_mode(small):
        return jax.jit(functools.partial(function, tiles=tiles)).lower(*arguments[0]).compile()
    except Exception as e:
      print(f"  {tiles}: {format_exception(e)}", flush=True)

  def measure(candidates):
    # Compilation takes most of the time, on one core each: it runs in parallel.
    with concurrent.futures.ThreadPoolExecutor(1 if small else os.cpu_count()) as pool:
      compiled = list(pool.map(compile_tiles, candidates))
    for tiles, call in zip(candidates, compiled, strict=True):
      if call is None:
        continue
      try:
        options = {"min_seconds": 0, "rounds": 1} if small else {"min_seconds": 0.02}
        seconds[tiles] = seconds_per_call(call, arguments, jax.block_until_ready, **options)
      except Exception as e:
        print(f"  {tiles}: {format_exception(e)}", flush=True)

  measure(candidates[:2] if small else candidates)
  if seconds and not small:  # bands matter less: they are tuned for the best tiles only
    best = min(seconds, key=seconds.get)
    measure([dataclasses.replace(best, band=band) for band in BANDS if band != best.band])
  return seconds


def interpret_mode(small: bool) -> contextlib.AbstractContextManager:
  """A context in which kernels for GPUs are interpreted on a CPU, if `small`."""
  if not small:
    return contextlib.nullcontext()
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams())


def gemms(small: bool) -> Iterator[Gemm]:
  """The GEMMs of the tables of fp8_matmul, or with `small` one small GEMM."""
  import jax.numpy as jnp

  from deepseek_jax.kernels.fp8_grouped_matmul import pallas_gpu as grouped
  from deepseek_jax.kernels.fp8_matmul import pallas_gpu as dense
  from deepseek_jax.kernels.tiles import table_key

  def with_operands_of(make_calls: Callable[[], Calls], function: Callable, **options: Any):
    """`Gemm.make_call` for a kernel, with the operands that fp8_matmul times it with."""
    return lambda: (functools.partial(function, **options), make_calls()["ours"][1])

  if small:
    make_calls = functools.partial(fp8_matmul.dense_calls, 128, 128, 128, "xla")
    make_call = with_operands_of(make_calls, dense.matmul, out_dtype=jnp.bfloat16)
    yield Gemm("fp8_matmul", table_key(jnp.bfloat16, 128, 128, 128, 1), "small", 2 * 128**3, make_call)
    return
  for (m, n, k), wgrad in [
    *zip(fp8_matmul.DENSE, itertools.repeat(False)),
    *zip(fp8_matmul.WGRAD, itertools.repeat(True)),
  ]:
    make_calls = functools.partial(fp8_matmul.dense_calls, m, n, k, "xla", wgrad=wgrad)
    out, kind = (jnp.float32, "wgrad") if wgrad else (jnp.bfloat16, "forward or dgrad")
    operation = "fp8_wgrad" if wgrad else "fp8_matmul"
    make_call = with_operands_of(make_calls, dense.matmul, out_dtype=out)
    yield Gemm(operation, table_key(out, m, n, k, 1), f"{kind} {m} x {n} x {k}", 2 * m * n * k, make_call)
  for groups, m, n, k in fp8_matmul.GROUPED:
    flops, sizes = 2 * groups * m * n * k, f"{groups} x {m} x {n} x {k}"
    make_calls = functools.partial(fp8_matmul.grouped_calls, groups, m, n, k, "xla")
    make_call = with_operands_of(make_calls, grouped.matmul, step=128, out_dtype=jnp.bfloat16)
    tiles_key = table_key(jnp.bfloat16, groups * m, n, k, groups)
    yield Gemm("fp8_grouped_matmul", tiles_key, f"grouped {sizes}", flops, make_call)
    make_calls = functools.partial(fp8_matmul.grouped_wgrad_calls, groups, m, n, k, "xla")
    make_call = with_operands_of(make_calls, grouped.wgrad, step=128, out_dtype=jnp.float32)
    tiles_key = table_key(jnp.float32, groups * k, n, groups * m, groups)
    yield Gemm("fp8_grouped_wgrad", tiles_key, f"grouped wgrad {sizes}", flops, make_call)


if __name__ == "__main__":
  run_program(main)
