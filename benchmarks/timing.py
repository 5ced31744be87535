"""Shared by the kernel benchmarks: tables of timed calls, beside other implementations of the same operation."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from absl import flags

from benchmarks.results import Results
from deepseek_jax.flags import parse
from deepseek_jax.selftest.timing import seconds_per_call

CACHE_BYTES = 200 * 2**20  # several times an H200's L2 cache
UNIT_SCALES = {"TFLOP/s": 1e12, "GB/s": 1e9}
ROW_SECONDS = 60  # a row that takes longer hangs; the first use of a kernel compiles it

# {implementation: (function, list of argument tuples)}
Calls = dict[str, tuple[Callable, Sequence[tuple]]]


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of a table."""

  name: str
  work: float  # FLOPs or bytes of a call
  unit: str  # of UNIT_SCALES, or "times NAME": the ratio to the rate of implementation NAME
  goal: float | None  # in `unit`
  floor: float | None
  make_calls: Callable[[], Calls]
  error: Callable | None = None  # (result, *arguments) of "ours" -> a number
  kernel: str | None = None  # which implementation "ours" is, if known


def run_table(
  argv: list[str],
  usage: str,
  make_rows: Callable[[str, bool], Iterable[Row]],
  columns: Sequence[str],
) -> int:
  """The main function of a table's program. Returns the exit code of `Results.run`.

  Args:
    make_rows: (implementation, small) -> rows.
    columns: shown between "ours" and "error": implementations of `Row.make_calls`, or "goal" and "floor".
  """
  values = flags.FlagValues()
  flags.DEFINE_float("seconds", 540, "after this time no row starts", flag_values=values)
  flags.DEFINE_float(
    "row_seconds", ROW_SECONDS, "a row that takes longer has failed, and the process ends", flag_values=values
  )
  flags.DEFINE_string("implementation", "auto", "of the kernels", flag_values=values)
  flags.DEFINE_string("json", None, "file of results: its rows are not measured again", flag_values=values)
  flags.DEFINE_bool("small", False, "sizes of a test", flag_values=values)
  parse(argv, values, usage)
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs GPU memory too

  import jax

  chip = jax.devices()[0].device_kind
  conditions = {"chip": chip, "jax": jax.__version__, "implementation": values.implementation, "small": values.small}
  results = Results(values.json, conditions, values.row_seconds)
  print(f"{chip}, jax {jax.__version__}, implementation {values.implementation}, random normal data")
  print(f"{'':40s}{'ours':>16s}{''.join(f'{name:>8s}' for name in columns)}  error")
  rows = {row.name: row for row in make_rows(values.implementation, values.small)}

  def show(row):
    print(format_row(row, columns), flush=True)

  return results.run(rows, lambda name: measure_row(rows[name]), show, values.seconds)


def measure_row(row: Row) -> dict[str, Any]:
  """{"unit", "goal", "floor", "kernel", the rate of each implementation in that unit, "error"}."""
  import jax

  rates: dict[str, float] = {}
  result: dict[str, Any] = {"unit": row.unit, "goal": row.goal, "floor": row.floor, "kernel": row.kernel}
  for name, (function, arguments) in row.make_calls().items():
    if name == "torch":
      with contextlib.suppress(RuntimeError):  # torch does not support these sizes or dtypes
        rates[name] = row.work / seconds_per_call(function, arguments, lambda _: torch_on_gpu().cuda.synchronize())
      continue
    function = jax.jit(function)
    if name == "ours" and row.error:
      result["error"] = float(jax.jit(row.error)(function(*arguments[0]), *arguments[0]))
    rates[name] = row.work / seconds_per_call(function, arguments, jax.block_until_ready)
  if row.unit in UNIT_SCALES:
    return result | {name: rate / UNIT_SCALES[row.unit] for name, rate in rates.items()}
  return result | {"ours": rates["ours"] / rates[row.unit.removeprefix("times ")]}


def format_row(row: Mapping[str, Any], columns: Sequence[str]) -> str:
  """The text of a row of the JSON."""
  if "failure" in row:
    return f"{row['name']:40s}{row['failure']}"
  error = row.get("error")
  values = (row.get(name) for name in columns)
  cells = "".join(f"{'' if value is None else f'{value:.4g}':>8s}" for value in values)
  ours = f"{row['ours']:.4g} {row['unit']}"
  return f"{row['name']:40s}{ours:>16s}{cells}  {'' if error is None else f'{error:.1e}'}"


def random_normal(*shape: int, seed: int = 0, dtype: str = "bfloat16") -> Any:
  """A jax.Array of standard normal numbers."""
  import jax

  return jax.random.normal(jax.random.key(seed), shape, dtype)


def copies_beyond_l2(*arguments: Any) -> list[tuple]:
  """`arguments` and copies of them, together larger than the L2 cache (at most 9 in all)."""
  import jax

  size = sum(a.nbytes for a in jax.tree.leaves(arguments))
  copy = jax.jit(lambda tree: jax.tree.map(lambda a: a.copy(), tree))
  return [arguments, *(copy(arguments) for _ in range(min(CACHE_BYTES // size, 8)))]


def torch_on_gpu() -> Any:
  """The torch module if it is installed and has a GPU, else None."""
  try:
    import torch
  except ImportError:
    return None
  return torch if torch.cuda.is_available() else None
