"""What the benchmarks of kernels share: tables of calls that are timed beside other implementations of the same."""

import contextlib
import dataclasses
import os
from collections.abc import Callable

from absl import flags

from benchmarks.results import Results
from deepseek_jax.flags import parse
from deepseek_jax.selftest.timing import seconds_a_call

CACHE_BYTES = 200 * 2**20  # several times an H200's
SCALES = {"TFLOP/s": 1e12, "GB/s": 1e9}
ROW_SECONDS = 60  # after which a row is taken to hang; the first use of a kernel compiles it


@dataclasses.dataclass(frozen=True)
class Row:
  """One line: `work` is FLOPs or bytes of a call; make() gives name -> (function, arguments).

  unit: of SCALES, or "times NAME": the rate beside that of NAME. error: (result, arguments) of "ours" -> a number. kernel:
  what "ours" is, if that is known.
  """

  name: str
  work: float
  unit: str
  goal: float | None
  floor: float | None
  make: Callable
  error: Callable | None = None
  kernel: str | None = None


def run_table(argv, usage, make_rows, columns) -> int:
  """The program of a table: its flags, its lines, its JSON. Returns the exit code, as `Results.run` does.

  Args:
    make_rows: (implementation, small) -> [Row].
    columns: what is shown between "ours" and "error": names of `Row.make`, or "goal" and "floor".
  """
  values = flags.FlagValues()
  flags.DEFINE_float("seconds", 540, "after which no row is started", flag_values=values)
  flags.DEFINE_float(
    "row_seconds", ROW_SECONDS, "after which a row has failed, and the process ends", flag_values=values
  )
  flags.DEFINE_string("implementation", "auto", "of the kernels", flag_values=values)
  flags.DEFINE_string("json", None, "file of results: rows that it has are not measured again", flag_values=values)
  flags.DEFINE_bool("small", False, "sizes of a test", flag_values=values)
  parse(argv, values, usage)
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory too

  import jax

  chip = jax.devices()[0].device_kind
  head = {"chip": chip, "jax": jax.__version__, "implementation": values.implementation, "small": values.small}
  results = Results(values.json, head, values.row_seconds)
  print(f"{chip}, jax {jax.__version__}, implementation {values.implementation}, random normal data")
  print(f"{'':40s}{'ours':>16s}{''.join(f'{name:>8s}' for name in columns)}  error")
  rows = {row.name: row for row in make_rows(values.implementation, values.small)}
  show = lambda row: print(line(row, columns), flush=True)
  return results.run(rows, lambda name: measure(rows[name]), show, values.seconds)


def measure(row: Row) -> dict:
  """{"unit", "goal", "floor", "kernel", rates of each of row.make() in that unit, "error"}."""
  import jax

  rates, found = {}, {"unit": row.unit, "goal": row.goal, "floor": row.floor, "kernel": row.kernel}
  for name, (function, arguments) in row.make().items():
    if name == "torch":
      with contextlib.suppress(RuntimeError):  # sizes or dtypes that this torch does not do: no number of its own
        rates[name] = row.work / seconds_a_call(function, arguments, lambda _: torch_on_gpu().cuda.synchronize())
      continue
    function = jax.jit(function)
    if name == "ours" and row.error:
      found["error"] = float(jax.jit(row.error)(function(*arguments[0]), *arguments[0]))
    rates[name] = row.work / seconds_a_call(function, arguments, jax.block_until_ready)
  if row.unit in SCALES:
    return found | {name: rate / SCALES[row.unit] for name, rate in rates.items()}
  return found | {"ours": rates["ours"] / rates[row.unit.removeprefix("times ")]}


def line(row: dict, columns) -> str:
  """The text of a row of a JSON."""
  if "failure" in row:
    return f"{row['name']:40s}{row['failure']}"
  show = lambda value: "" if value is None else f"{value:.4g}"
  ours, error = f"{row['ours']:.4g} {row['unit']}", row.get("error")
  others = "".join(f"{show(row.get(name)):>8s}" for name in columns)
  return f"{row['name']:40s}{ours:>16s}{others}  {'' if error is None else f'{error:.1e}'}"


def normal(*shape, seed=0, dtype="bfloat16"):
  """An array of standard normal numbers."""
  import jax

  return jax.random.normal(jax.random.key(seed), shape, dtype)


def copies(*arguments):
  """As many copies of `arguments` as the L2 cache does not hold."""
  import jax

  size = sum(a.nbytes for a in jax.tree.leaves(arguments))
  again = jax.jit(lambda tree: jax.tree.map(lambda a: a.copy(), tree))
  return [arguments, *(again(arguments) for _ in range(min(CACHE_BYTES // size, 8)))]


def torch_on_gpu():
  """torch where it is installed and has a GPU, or None."""
  try:
    import torch
  except ImportError:
    return None
  return torch if torch.cuda.is_available() else None
