"""Selects the implementation of a kernel, records the kernel calls of a program, and types arrays inside shard_map."""

import contextlib
import contextvars
import dataclasses
import importlib.util
import logging
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from deepseek_jax.typing import PyTree

IMPLEMENTATIONS = ("xla", "reference", "pallas_tpu", "pallas_gpu")  # files in a kernel's folder
_log = logging.getLogger(__name__)


class Unsupported(ValueError):
  """An implementation does not support the operands, or is not installed; the message says what is, and what came."""


@dataclasses.dataclass(frozen=True)
class Support:
  """Whether an implementation does a call: true, or false with the reason, which follows "since"."""

  reason: str = ""

  def __bool__(self) -> bool:
    return not self.reason


SUPPORTED = Support()


@dataclasses.dataclass(frozen=True)
class Call:
  """A call of `function` of `kernels/<kernel>/<file>.py`, by what fixes its program: arrays are ShapeDtypeStructs."""

  kernel: str
  function: str
  file: str
  arguments: tuple

  @property
  def name(self) -> str:
    return f"{self.kernel}.{self.function}"

  @property
  def key(self) -> str:
    """Unique among calls, and readable: `fp8_matmul.matmul(float8_e4m3fn[8192,7168]/1x128, ..)`."""
    return f"{self.name}({', '.join(_describe(x) for x in self.arguments)})"


@dataclasses.dataclass(frozen=True)
class Replacements:
  """Pallas kernel calls that XLA's implementation is to replace.

  functions: "kernel.function", every call of which is replaced. calls: keys of single calls, see `Call.key`.
  """

  functions: frozenset[str] = frozenset()
  calls: frozenset[str] = frozenset()

  def __contains__(self, call: Call) -> bool:
    return call.name in self.functions or call.key in self.calls


NO_REPLACEMENTS = Replacements()
_replacements = contextvars.ContextVar("replacements", default=NO_REPLACEMENTS)
_recorded_calls: contextvars.ContextVar[dict[str, Call] | None] = contextvars.ContextVar("recorded_calls", default=None)


@contextlib.contextmanager
def replace_kernels(replacements: Replacements) -> Iterator[None]:
  """Programs that are traced in the block fall back to XLA for the kernel calls that `replacements` names."""
  token = _replacements.set(replacements)
  try:
    yield
  finally:
    _replacements.reset(token)


@contextlib.contextmanager
def record_calls() -> Iterator[dict[str, Call]]:
  """Gives a dict to which the Pallas kernel calls that are traced in the block are added, by their keys.

  The program has XLA's implementations in their place. So a kernel that cannot even be traced is recorded, and raises
  nothing.
  """
  calls: dict[str, Call] = {}
  token = _recorded_calls.set(calls)
  try:
    yield calls
  finally:
    _recorded_calls.reset(token)


def call_kernel(
  kernel: str, function: str, implementation: str, *args: Any, fallback: Callable[[], Any] | None = None
) -> Any:
  """The result of `function` of `kernels/<kernel>/<implementation>.py` for `args`.

  Args:
    implementation: one of IMPLEMENTATIONS; "pallas": the platform's Pallas kernel; "auto": likewise, with a fallback to
      XLA where there is none, where it does not support these shapes, which is logged once, or where `replace_kernels`
      says so.
    fallback: gives the result in XLA's place, of a platform whose kernel does not support these shapes.

  Raises:
    ValueError: no such implementation, or none for this platform.
    Unsupported: the implementation that was named does not support these shapes, or is replaced.
  """
  call = Call(kernel, function, resolve_implementation(kernel, implementation), jax.tree.map(_abstract, args))
  if not call.file.startswith("pallas"):
    return load_function(kernel, function, call.file)(*args)
  if call in _replacements.get():
    if implementation == "auto":
      return fallback() if fallback else load_function(kernel, function, "xla")(*args)
    raise Unsupported(f"the self-test replaced {call.name}")
  try:
    if not (support := supports(kernel, function, call.file, *args)):
      raise Unsupported(support.reason)
    if (recorded := _recorded_calls.get()) is None:
      return load_function(kernel, function, call.file)(*args)
    if call.key not in recorded:
      _record(call, args, recorded)
  except Unsupported as e:
    if implementation != "auto":
      raise
    log_fallback(kernel, str(e))
    if fallback:
      return fallback()
  return load_function(kernel, function, "xla")(*args)


def supports(kernel: str, function: str, file: str, *args: Any) -> Support:
  """Whether `file` does the call of `function` with these arguments: their shapes and dtypes, on this kind of device.

  Whether libraries that it needs are installed is not asked.

  Args:
    args: as of the function. Arrays may be ShapeDtypeStructs.
  """
  return load_function(kernel, file, "supports")(function, *args) if file.startswith("pallas") else SUPPORTED


def _record(call: Call, args: tuple, recorded: dict[str, Call]) -> None:
  """Adds `call` to `recorded`.

  Raises Unsupported as its kernel does; other errors are left to the self-test to find.
  """
  try:
    load_function(call.kernel, call.function, call.file)(*args)
  except Unsupported:
    raise
  except Exception as e:
    _log.info("%s: %s", call.key, e)
  recorded[call.key] = call


def resolve_implementation(kernel: str, implementation: str) -> str:
  """The file, of IMPLEMENTATIONS, that `call_kernel` takes for `implementation`.

  Raises ValueError as `call_kernel` does.
  """
  available = [file for file in IMPLEMENTATIONS if importlib.util.find_spec(f"deepseek_jax.kernels.{kernel}.{file}")]
  native = native_file(device_kind())
  if native not in available or (
    implementation == "auto" and kernel in XLA_IS_BETTER and XLA_IS_BETTER[kernel](device_kind())
  ):
    native = None
  if implementation == "pallas" and native is None:
    raise ValueError(f"{kernel}: no Pallas kernel for {device_kind()}: use auto or xla")
  if implementation not in (*available, "auto", "pallas"):
    raise ValueError(f"{kernel} has no implementation {implementation!r}: use auto, pallas, {', '.join(available)}")
  if implementation in ("auto", "pallas"):
    return native or "xla"
  return implementation


def import_libraries() -> None:
  """Imports the libraries that this platform's kernels call, before a program is traced.

  tokamax changes settings of jax when it is imported. jax then traces again: V3's step twice (jax 0.12).
  """
  if native_file(device_kind()) == "pallas_gpu":
    load_function("attention", "import_library", "pallas_gpu")()


def device_kind() -> str:
  """The kind of device that the program is traced for, such as "cpu", "TPU v5", "NVIDIA H200"."""
  return (jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]).device_kind


def native_file(device_kind: str) -> str | None:
  """The file of a platform's Pallas kernels, or None. Those for GPUs need Hopper's tensor cores."""
  if device_kind.startswith("TPU"):
    return "pallas_tpu"
  return "pallas_gpu" if is_hopper(device_kind) else None


def is_hopper(device_kind: str) -> bool:
  """Whether such a device is an H100, H200, GH200 or the like."""
  return bool(re.search(r"\bG?H\d+\b", device_kind))


def load_function(kernel: str, function: str, file: str) -> Callable:
  """`function` of `kernels/<kernel>/<file>.py`."""
  # Imported where used: Pallas adds 0.3 s to the start of a program (2 cores of a shared machine).
  return getattr(importlib.import_module(f"deepseek_jax.kernels.{kernel}.{file}"), function)


def has_ragged_dot(device_kind: str) -> bool:
  """Whether XLA multiplies groups without extra work on devices of this kind."""
  # One chip, by its two names; v5e is "tpu v5 lite".
  return device_kind.lower() in ("tpu v5", "tpu v5p")


# Kernels for which auto takes XLA's implementation on some kinds of devices, though these have a Pallas kernel.
XLA_IS_BETTER: dict[str, Callable[[str], bool]] = {"grouped_matmul": has_ragged_dot}
_fallbacks_logged: set[tuple[str, str]] = set()


def log_fallback(kernel: str, reason: str) -> None:
  """Logs that `kernel` falls back to XLA: one warning for each kernel and reason of a process."""
  if (kernel, reason) not in _fallbacks_logged:
    _fallbacks_logged.add((kernel, reason))
    _log.warning(f"{kernel}: falling back to XLA: {reason}")


def accumulation(x: jax.Array) -> dict[str, Any]:
  """Precision and accumulator dtype of products of `x`.

  Given with each product: backward passes are traced outside the model's matmul_precision.
  """
  precision = None if x.dtype == jax.numpy.bfloat16 else jax.lax.Precision.HIGHEST
  return {"preferred_element_type": jax.numpy.promote_types(x.dtype, jax.numpy.float32), "precision": precision}


def match_vma(*trees: PyTree) -> PyTree:
  """`trees`, a tuple, typed as varying over all manual mesh axes that any of their arrays varies over.

  Loops need it of what they carry: their input and output types must agree. Backward, the cast sums the devices'
  gradients.
  """
  varying = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in jax.tree.leaves(trees)))

  def match_leaf(a):
    missing = tuple(varying - jax.typeof(a).manual_axis_type.varying)
    return jax.lax.pcast(a, missing, to="varying") if missing else a

  return jax.tree.map(match_leaf, trees)


def _abstract(leaf: Any) -> Any:
  """The shape and dtype of a jax.Array.

  NumPy arrays, which are constants of a program, and all else stay as they are.
  """
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf


def _describe(x: Any) -> str:
  """An argument in `Call.key`."""
  if isinstance(x, jax.ShapeDtypeStruct):
    return f"{jax.numpy.dtype(x.dtype).name}[{','.join(map(str, x.shape))}]"
  if isinstance(x, np.ndarray):
    return f"{x.dtype}[{','.join(map(str, x.shape))}]#{zlib.crc32(x.tobytes()):08x}"
  if isinstance(x, tuple):
    return f"({', '.join(map(_describe, x))})"
  if hasattr(x, "tile"):  # a QTensor
    return f"{_describe(x.values)}/{x.tile[0]}x{x.tile[1]}"
  return jax.numpy.dtype(x).name if isinstance(x, (type, np.dtype)) else repr(x)
