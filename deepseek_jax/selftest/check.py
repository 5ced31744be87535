"""Compares one kernel with XLA's implementation on the local device: errors, times, and the verdict."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.errors import format_exception
from deepseek_jax.kernels.implementations import load_function
from deepseek_jax.kernels.qtensor import QTensor
from deepseek_jax.selftest.cases import Case
from deepseek_jax.selftest.operations import KERNEL_SPECS, draw_normal, make_inputs
from deepseek_jax.selftest.timing import seconds_per_call
from deepseek_jax.typing import PyTree

OK, SLOW, WRONG, FAILED, CRASHED, HUNG, UNCOMPARED = (
  "ok", "slow", "wrong", "failed", "crashed", "hung", "no reference",
)  # fmt: skip
BROKEN = (WRONG, FAILED, CRASHED, HUNG)  # verdicts on a kernel that must not be used
SLOW_RATIO = 1.1  # a kernel is slow from this ratio to XLA's time on
LAUNCH_SECONDS = 20e-6  # a smaller difference may be that of launching two programs
BLOCK = 128  # rows and columns of a block whose error is one norm
SCALE_ERROR = 1e-5  # relative, of scales of FP8 tensors
UNITS = {"TFLOP/s": 1e12, "GB/s": 1e9}


@dataclasses.dataclass
class Result:
  """The outcome of a case. Fields are keys of the JSON report.

  kernel: "kernel.function". shape: the arguments in `Call.key`.
  calls: how many calls of the program the case covers. sliced: each of them is larger than what was tested.
  unit: of `rate`. verdict: OK, SLOW, WRONG, FAILED, CRASHED, HUNG or UNCOMPARED. message: its reason.
  error: the largest of `relative_errors`. bound: the largest that passes.
  seconds, xla_seconds: of a call, forward and, where gradients are tested, backward. rate: work over `seconds`.
  transient: a second test may give another verdict, so that this one is not saved.
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


def new_result(key: str, kernel: str, covers: Sequence[str], verdict: str = OK, message: str = "") -> Result:
  """The Result of the case `key` of `kernel`, which covers the calls `covers`."""
  shape, unit = key.partition("(")[2].removesuffix(")"), KERNEL_SPECS[kernel].unit
  return Result(kernel, shape, len(covers), key not in covers, unit, verdict, message)


Precision = Callable[[], contextlib.AbstractContextManager]


@dataclasses.dataclass
class CompiledCase:
  """A case's inputs, and the compiled programs of the kernel and of XLA, or the exception that compilation raised."""

  inputs: list[np.ndarray]
  kernel: Callable | Exception
  xla: Callable | Exception


def compile_case(case: Case, precision: Precision) -> CompiledCase:
  """Compiles both implementations of `case`; `precision` makes the context in which float32 products are traced."""
  inputs, functions = traceable_functions(case, precision)

  def compile_file(file):
    try:
      return jax.jit(functions[file]).lower(*inputs).compile()
    except Exception as error:  # any error is a verdict on this kernel, and others are still to be tested
      return error

  return CompiledCase(inputs, compile_file(case.call.file), compile_file("xla"))


def traceable_functions(case: Case, precision: Precision) -> tuple[list[np.ndarray], dict[str, Callable]]:
  """(inputs, {file: function of them}) of the kernel of `case` and of XLA: forward, and backward if that is tested."""
  call = case.call
  abstract, tree = jax.tree.flatten(call.arguments)
  traced = [i for i, leaf in enumerate(abstract) if isinstance(leaf, jax.ShapeDtypeStruct)]
  leaves = jax.tree.leaves(make_inputs(call))
  inputs = [leaves[i] for i in traced]

  def implementation(file):
    def forward(*arrays):
      merged = list(abstract)
      for i, array in zip(traced, arrays, strict=True):
        merged[i] = array
      return load_function(call.kernel, call.function, file)(*jax.tree.unflatten(tree, merged))

    return forward

  if argnums := case.spec.gradients:
    inputs.append(draw_normal(jax.eval_shape(implementation("xla"), *inputs)))  # the cotangent

  def forward_backward(file, *arrays):
    with precision():
      if not argnums:
        return implementation(file)(*arrays)
      *primals, cotangent = arrays

      def forward(*differentiated):
        arguments = (differentiated[argnums.index(i)] if i in argnums else x for i, x in enumerate(primals))
        return implementation(file)(*arguments)

      y, vjp = jax.vjp(forward, *(primals[i] for i in argnums))
      return y, vjp(cotangent)

  return inputs, {file: functools.partial(forward_backward, file) for file in (call.file, "xla")}


def check_case(case: Case, programs: CompiledCase, begin: Callable[[str], None] = lambda phase: None) -> Result:
  """Runs both programs and compares them. Calls `begin` before each phase: reference, kernel, compare, time."""
  result, expected, reason = new_result(case.key, case.name, case.covers), None, ""
  begin("reference")
  try:
    arrays = jax.block_until_ready(jax.device_put(programs.inputs))
  except Exception as error:
    return dataclasses.replace(result, verdict=UNCOMPARED, message=f"inputs: {format_exception(error)}", transient=True)
  try:
    expected = jax.block_until_ready(_compiled(programs.xla)(*arrays))
  except Exception as error:  # as where the device has no memory for it
    reason = f"XLA: {format_exception(error)}"
  begin("kernel")
  try:
    actual = jax.block_until_ready(_compiled(programs.kernel)(*arrays))
  except Exception as error:
    no_memory = "RESOURCE_EXHAUSTED" in str(error)
    return dataclasses.replace(result, verdict=FAILED, message=format_exception(error), transient=no_memory)
  begin("compare")
  bound = case.spec.bounds[jax.tree.leaves(actual)[0].dtype.name]
  errors = [float(error) for error in jax.jit(relative_errors)(actual, actual if reason else expected)]
  del actual, expected
  if any(map(math.isnan, errors)):
    return dataclasses.replace(result, verdict=WRONG, message="results are not finite", bound=bound)
  if math.inf in errors:
    reason = "XLA: results are not finite"
  if reason:
    return dataclasses.replace(result, verdict=UNCOMPARED, message=reason, transient=True)
  max_error = max(errors)
  result = dataclasses.replace(result, bound=bound, error=max_error)
  if max_error > bound:
    return dataclasses.replace(result, verdict=WRONG, message=f"error {max_error:.2g} above {bound:.2g}")
  begin("time")
  return _time_case(case, programs, arrays, result)


def _time_case(case: Case, programs: CompiledCase, arrays: Sequence, result: Result) -> Result:
  for rounds in (2, 6):  # a kernel is slow only where a longer measurement agrees
    seconds, xla_seconds = (
      seconds_per_call(_compiled(program), [arrays], jax.block_until_ready, 0.01, rounds)
      for program in (programs.kernel, programs.xla)
    )
    if seconds <= SLOW_RATIO * xla_seconds or seconds <= xla_seconds + LAUNCH_SECONDS:
      break
  else:
    result.verdict, result.message = SLOW, f"{seconds / xla_seconds:.2f} times as long as XLA"
  result.seconds, result.xla_seconds = seconds, xla_seconds
  result.rate = case.work / seconds / UNITS[result.unit]
  return result


def device_works() -> bool:
  """Whether the device still computes. After some errors of a kernel a process can no longer use it."""
  try:
    return float(jax.jit(jnp.sum)(jnp.ones(1024))) == 1024
  except Exception:  # any error is the answer
    return False


def relative_errors(actual: PyTree, expected: PyTree) -> list[jax.Array]:
  """The error of each pair of results.

  It is NaN where a value of `actual` is not finite, infinity where one of `expected` is not.

  - Of arrays a and b the largest, over blocks of 128 x 128, of |a - b| / |b| (Frobenius norms) and, over single values,
    of |a - b| / (16 r + 8 |b|), where r is the root mean square of the block. A block's norm counts as at least a
    thousandth of the blocks' root mean square.
  - Of QTensors only the norms, since a value may be rounded to either neighbor, and 1 more where scales differ by more
    than SCALE_ERROR.
  """
  pairs = zip(_result_leaves(actual), _result_leaves(expected), strict=True)
  return [_fp8_error(a, b) if isinstance(a, QTensor) else _error(a, b) for a, b in pairs]


def _fp8_error(a: QTensor, b: QTensor) -> jax.Array:
  scales_differ = (jnp.abs(a.scales - b.scales) > SCALE_ERROR * b.scales).any()
  return _error(a.dequantize(), b.dequantize(), single_values=False) + scales_differ


def _error(a: jax.Array, b: jax.Array, single_values: bool = True) -> jax.Array:
  a, b = (x.astype(jnp.float32).reshape(-1, x.shape[-1]) for x in (a, b))
  difference, norm = (_block_norms(x) for x in (a - b, b))
  norm = jnp.maximum(norm, 1e-3 * jnp.sqrt(jnp.mean(norm**2)) + 1e-30)
  error = (difference / norm).max()
  if single_values:
    root_mean_square = norm / jnp.maximum(_block_norms(jnp.ones_like(b)), 1)
    allowed = 16 * root_mean_square[:, None, :, None] + 8 * jnp.abs(_blocks(b))
    error = jnp.maximum(error, (jnp.abs(_blocks(a - b)) / allowed).max())
  error = jnp.where(jnp.isfinite(b).all(), error, jnp.inf)
  return jnp.where(jnp.isfinite(a).all(), error, jnp.nan)


def _blocks(x):
  """[rows, columns] -> [blocks down, 128, blocks across, 128], zeros beyond."""
  rows, columns = x.shape
  x = jnp.pad(x, ((0, -rows % BLOCK), (0, -columns % BLOCK)))
  return x.reshape(x.shape[0] // BLOCK, BLOCK, -1, BLOCK)


def _block_norms(x):
  return jnp.sqrt(jnp.square(_blocks(x)).sum((1, 3)))  # [blocks down, blocks across]


def _result_leaves(tree):
  return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, QTensor))


def _compiled(program: Callable | Exception) -> Callable:
  """`program`, or raises the exception of its compilation."""
  if isinstance(program, Exception):
    raise program
  return program
