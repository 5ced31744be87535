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
LAUNCH_SECONDS = 20e-6  # a difference that may be that of launching two programs
BLOCK = 128  # rows and columns whose error counts together
SCALE_ERROR = 1e-5  # relative, of scales of FP8 tensors
UNITS = {"TFLOP/s": 1e12, "GB/s": 1e9}


@dataclasses.dataclass
class Result:
  """What the test of a case found; JSON holds all of it.

  calls: how many calls of the program it stands for. sliced: whether each of them is larger than what was tested. error: the
  largest of the results' errors as `relative_errors` gives them; `bound` is the largest that passes. seconds: of a call, forward
  and where gradients are tested backward. rate: work over that time, in `unit`. transient: it may be another the next time, and
  is not kept.
  """

  kernel: str
  shape: str
  calls: int
  sliced: bool
  unit: str
  verdict: str
  message: str = ""
  bound: float | None = None
  error: float | None = None
  seconds: float | None = None
  xla_seconds: float | None = None
  rate: float | None = None
  transient: bool = False


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

  if argnums := case.operation.gradients:
    inputs.append(draw(jax.eval_shape(function("xla"), *inputs)))  # the cotangent

  def both_passes(file, *arrays):
    with precision():
      if not argnums:
        return function(file)(*arrays)
      *arrays, cotangent = arrays

      def forward(*differentiated):
        return function(file)(*(differentiated[argnums.index(i)] if i in argnums else x for i, x in enumerate(arrays)))

      y, pull = jax.vjp(forward, *(arrays[i] for i in argnums))
      return y, pull(cotangent)

  return inputs, {file: functools.partial(both_passes, file) for file in (call.file, "xla")}


def check_case(case: Case, programs: Programs, begin: Callable[[str], None] = lambda phase: None) -> Result:
  """Runs both programs and compares them; `begin` is told which phase comes: reference, kernel, compare, time."""
  result, theirs, reason = new_result(case.key, case.name, case.stands_for), None, ""
  begin("reference")
  try:
    arrays = jax.block_until_ready(jax.device_put(programs.inputs))
  except Exception as error:
    return dataclasses.replace(result, verdict=UNCOMPARED, message=f"inputs: {first_line(error)}", transient=True)
  try:
    theirs = jax.block_until_ready(_called(programs.xla)(*arrays))
  except Exception as error:  # as where the device has no memory for it
    reason = f"XLA's form: {first_line(error)}"
  begin("kernel")
  try:
    ours = jax.block_until_ready(_called(programs.kernel)(*arrays))
  except Exception as error:
    no_memory = "RESOURCE_EXHAUSTED" in str(error)
    return dataclasses.replace(result, verdict=FAILED, message=first_line(error), transient=no_memory)
  begin("compare")
  bound = case.operation.bounds[jax.tree.leaves(ours)[0].dtype.name]
  errors = [float(error) for error in jax.jit(relative_errors)(ours, ours if reason else theirs)]
  del ours, theirs
  if any(map(math.isnan, errors)):
    return dataclasses.replace(result, verdict=WRONG, message="results are not finite", bound=bound)
  if math.inf in errors:
    reason = "XLA's form: results are not finite"
  if reason:
    return dataclasses.replace(result, verdict=UNCOMPARED, message=reason, transient=True)
  result = dataclasses.replace(result, bound=bound, error=max(errors))
  if result.error > bound:
    return dataclasses.replace(result, verdict=WRONG, message=f"error {result.error:.2g} above {bound:.2g}")
  begin("time")
  return _timed(case, programs, arrays, result)


def _timed(case, programs, arrays, result):
  for rounds in (2, 6):  # a kernel is slow only where a longer look agrees
    result.seconds = seconds_a_call(programs.kernel, [arrays], jax.block_until_ready, 0.01, rounds)
    result.xla_seconds = seconds_a_call(programs.xla, [arrays], jax.block_until_ready, 0.01, rounds)
    slow = result.seconds > SLOWER * result.xla_seconds and result.seconds > result.xla_seconds + LAUNCH_SECONDS
    if not slow:
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
  """The error of each pair of results; NaN where a value of `ours` is not finite, infinity where one of `theirs` is not.

  Of arrays the largest, over blocks of 128 x 128, of |ours - theirs| / |theirs| (Frobenius norms) and, over single values, of
  |a - b| / (16 r + 8 |b|), r being the root mean square of the block. Blocks far below the others count as a thousandth of them.
  Of QTensors norms of blocks alone, since a value may be rounded to either neighbour, and 1 more where scales differ by more
  than SCALE_ERROR.
  """
  pairs = zip(_results(ours), _results(theirs), strict=True)
  return [_fp8_error(a, b) if isinstance(a, QTensor) else _error(a, b) for a, b in pairs]


def _fp8_error(a, b):
  differ = (jnp.abs(a.scales - b.scales) > SCALE_ERROR * b.scales).any()
  return _error(a.dequantized(), b.dequantized(), single_values=False) + differ


def _error(a, b, single_values=True):
  a, b = (x.astype(jnp.float32).reshape(-1, x.shape[-1]) for x in (a, b))
  difference, size = (_block_norms(x) for x in (a - b, b))
  size = jnp.maximum(size, 1e-3 * jnp.sqrt(jnp.mean(size**2)) + 1e-30)
  found = (difference / size).max()
  if single_values:
    root_mean_square = size / jnp.maximum(_block_norms(jnp.ones_like(b)), 1)
    allowed = 16 * root_mean_square[:, None, :, None] + 8 * jnp.abs(_blocks(b))
    found = jnp.maximum(found, (jnp.abs(_blocks(a - b)) / allowed).max())
  found = jnp.where(jnp.isfinite(b).all(), found, jnp.inf)
  return jnp.where(jnp.isfinite(a).all(), found, jnp.nan)


def _blocks(x):
  """[rows, columns] -> [blocks down, 128, blocks across, 128], zeros beyond."""
  rows, columns = x.shape
  x = jnp.pad(x, ((0, -rows % BLOCK), (0, -columns % BLOCK)))
  return x.reshape(x.shape[0] // BLOCK, BLOCK, -1, BLOCK)


def _block_norms(x):
  return jnp.sqrt(jnp.square(_blocks(x)).sum((1, 3)))  # [blocks down, blocks across]


def _results(tree):
  return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, QTensor))


def _called(program):
  if isinstance(program, Exception):
    raise program
  return program


def first_line(error: Exception) -> str:
  return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]:.300}"
