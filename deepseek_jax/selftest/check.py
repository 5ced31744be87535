"""One kernel beside XLA's form, on the device that is here: errors, times, and the verdict."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.kernels.implementations import load_function
from deepseek_jax.kernels.qtensor import QTensor
from deepseek_jax.selftest.cases import Case
from deepseek_jax.selftest.operations import OPERATIONS, draw, make_inputs
from deepseek_jax.selftest.timing import seconds_a_call

OK, SLOW, WRONG, FAILED, CRASHED, HUNG, UNCOMPARED = (
  "ok", "slow", "wrong", "failed", "crashed", "hung", "no reference",
)  # fmt: skip
BROKEN = (WRONG, FAILED, CRASHED, HUNG)  # verdicts on a kernel that must not be used
SLOWER = 1.1  # times XLA's time: from here on XLA's form is the better one
BLOCK = 128  # rows and columns whose error counts together
UNITS = {"TFLOP/s": 1e12, "GB/s": 1e9}


@dataclasses.dataclass
class Result:
  """What the test of a case found; JSON holds all of it.

  stands_for: calls of the program. sliced: whether each of them is larger than what was tested. error: the greatest of
  `errors`, of each result, relative, of any block against XLA's form; `bound` is the greatest that passes. seconds: of a call,
  forward and where gradients are tested backward. rate: work over that time, in `unit`.
  """

  kernel: str
  shape: str
  stands_for: int
  sliced: bool
  unit: str
  verdict: str
  message: str = ""
  bound: float | None = None
  error: float | None = None
  errors: list[float] = dataclasses.field(default_factory=list)
  seconds: float | None = None
  xla_seconds: float | None = None
  rate: float | None = None


def new_result(key: str, kernel: str, stands_for: Sequence[str], verdict: str = OK, message: str = "") -> Result:
  shape, unit = key.partition("(")[2].removesuffix(")"), OPERATIONS[kernel].unit
  return Result(kernel, shape, len(stands_for), key not in stands_for, unit, verdict, message)


Precision = Callable[[], contextlib.AbstractContextManager]


@dataclasses.dataclass
class Programs:
  """A case's inputs, and the compiled programs of the kernel and of XLA's form, or what was raised instead."""

  inputs: list[np.ndarray]
  kernel: Callable | Exception
  xla: Callable | Exception


def compile_case(case: Case, precision: Precision) -> Programs:
  """Compiles both forms of `case`; `precision` makes the context that float32 products are traced in."""
  inputs, forms = traceable_forms(case, precision)

  def compiled(file):
    try:
      return jax.jit(forms[file]).lower(*inputs).compile()
    except Exception as error:  # whatever it is, it is a verdict on this kernel, and others are still to be tested
      return error

  return Programs(inputs, compiled(case.call.file), compiled("xla"))


def traceable_forms(case: Case, precision: Precision) -> tuple[list[np.ndarray], dict[str, Callable]]:
  """(inputs, {file: function of them}) of the kernel of `case` and of XLA's form, forward and where it says so backward."""
  call = case.call
  abstract, tree = jax.tree.flatten(call.arguments)
  traced = [i for i, leaf in enumerate(abstract) if isinstance(leaf, jax.ShapeDtypeStruct)]
  leaves = jax.tree.leaves(make_inputs(call))
  inputs = [leaves[i] for i in traced]

  def function(file):
    def forward(*arrays):
      merged = list(abstract)
      for i, array in zip(traced, arrays, strict=True):
        merged[i] = array
      return load_function(call.kernel, call.function, file)(*jax.tree.unflatten(tree, merged))

    return forward

  if of := case.operation.gradients:
    inputs.append(draw(jax.eval_shape(function("xla"), *inputs)))  # the cotangent

  def both_passes(file, *arrays):
    with precision():
      if not of:
        return function(file)(*arrays)
      *arrays, cotangent = arrays

      def forward(*differentiated):
        return function(file)(*(differentiated[of.index(i)] if i in of else x for i, x in enumerate(arrays)))

      y, pull = jax.vjp(forward, *(arrays[i] for i in of))
      return y, pull(cotangent)

  return inputs, {file: functools.partial(both_passes, file) for file in (call.file, "xla")}


def check_case(case: Case, programs: Programs) -> Result:
  """Runs both programs and compares them."""
  result = new_result(case.key, case.name, case.stands_for)
  try:
    arrays = jax.device_put(programs.inputs)
    ours = jax.block_until_ready(_called(programs.kernel)(*arrays))
  except Exception as error:
    return dataclasses.replace(result, verdict=FAILED, message=first_line(error))
  try:
    theirs = jax.block_until_ready(_called(programs.xla)(*arrays))
  except Exception as error:  # as when the device has no memory for it
    finite = all(bool(jnp.isfinite(array.astype(jnp.float32)).all()) for array in _arrays(ours))
    text = f"XLA's form: {first_line(error)}" if finite else "results are not finite"
    return dataclasses.replace(result, verdict=UNCOMPARED if finite else WRONG, message=text)
  result.bound = _bound(case, ours)
  errors = [float(error) for error in jax.jit(relative_errors)(ours, theirs)]
  del ours, theirs
  if not all(map(math.isfinite, errors)):
    return dataclasses.replace(result, verdict=WRONG, message="results are not finite")
  result.errors, result.error = errors, max(errors)
  if result.error > result.bound:
    message = f"error {result.error:.2g} above {result.bound:.2g}"
    return dataclasses.replace(result, verdict=WRONG, message=message)
  for rounds in (2, 6):  # a kernel is slow only where a longer look agrees
    result.seconds = seconds_a_call(programs.kernel, [arrays], jax.block_until_ready, 0.01, rounds)
    result.xla_seconds = seconds_a_call(programs.xla, [arrays], jax.block_until_ready, 0.01, rounds)
    if result.seconds <= SLOWER * result.xla_seconds:
      break
  else:
    result.verdict, result.message = SLOW, f"{result.seconds / result.xla_seconds:.2f} times as long as XLA's form"
  result.rate = case.work / result.seconds / UNITS[result.unit]
  return result


def device_works() -> bool:
  """Whether the device still computes; after some errors of a kernel a process can do no more with it."""
  try:
    return float(jax.jit(jnp.sum)(jnp.ones(1024))) == 1024
  except Exception:  # any error is the answer
    return False


def relative_errors(ours, theirs) -> list[jax.Array]:
  """Of each pair of results the greatest error of a block, NaN where a value is not finite.

  Of a block of 128 x 128 |ours - theirs| / |theirs|, Frobenius norms; blocks far below the others count as a thousandth of them.
  """

  def error(a, b):
    a, b = (x.astype(jnp.float32).reshape(-1, x.shape[-1]) for x in (a, b))
    difference, size = (_block_norms(x) for x in (a - b, b))
    found = (difference / jnp.maximum(size, 1e-3 * jnp.sqrt(jnp.mean(size**2)) + 1e-30)).max()
    return jnp.where(jnp.isfinite(a).all(), found, jnp.nan)

  return [error(*pair) for pair in zip(_arrays(ours), _arrays(theirs), strict=True)]


def _block_norms(x):
  """[rows, columns] -> norms [blocks down, blocks across]."""
  rows, columns = x.shape
  x = jnp.pad(x, ((0, -rows % BLOCK), (0, -columns % BLOCK)))
  return jnp.sqrt(jnp.square(x).reshape(x.shape[0] // BLOCK, BLOCK, -1, BLOCK).sum((1, 3)))


def _arrays(result):
  """The arrays of a result; of a QTensor its values and its scales."""
  found = jax.tree.leaves(result, is_leaf=lambda x: isinstance(x, QTensor))
  return [array for x in found for array in ((x.dequantized(), x.scales) if isinstance(x, QTensor) else (x,))]


def _bound(case, result):
  return case.operation.bounds[jax.tree.leaves(result)[0].dtype.name]


def _called(program):
  if isinstance(program, Exception):
    raise program
  return program


def first_line(error: Exception) -> str:
  return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]:.300}"
