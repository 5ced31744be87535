"""Which implementation of a kernel runs, which calls a program makes, and types that all kernels need inside shard_map."""

import contextlib
import contextvars
import dataclasses
import functools
import importlib.util
import logging
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

IMPLEMENTATIONS = ("xla", "reference", "pallas_tpu", "pallas_gpu")  # files in a kernel's folder
_log = logging.getLogger(__name__)


class Unsupported(ValueError):
  """An implementation does not do what is asked; the message says what it does, and names the shapes that came."""


@dataclasses.dataclass(frozen=True)
class Call:
  """A call of `kernels/<kernel>/<file>.py`'s `function`, by what fixes its program: arrays are ShapeDtypeStructs."""

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
    return f"{self.name}({', '.join(_shown(x) for x in self.arguments)})"


@dataclasses.dataclass(frozen=True)
class Replacements:
  """Calls that XLA's form is to serve where a Pallas kernel would: of `functions` ("kernel.function") any, and `calls`."""

  functions: frozenset[str] = frozenset()
  calls: frozenset[str] = frozenset()

  def __contains__(self, call: Call) -> bool:
    return call.name in self.functions or call.key in self.calls


NO_REPLACEMENTS = Replacements()
_replacements = contextvars.ContextVar("replacements", default=NO_REPLACEMENTS)
_recorded: contextvars.ContextVar[dict[str, Call] | None] = contextvars.ContextVar("recorded", default=None)


@contextlib.contextmanager
def replace_kernels(replacements: Replacements) -> Iterator[None]:
  """Programs that are traced in the block have XLA's form in place of the kernels that `replacements` names."""
  token = _replacements.set(replacements)
  try:
    yield
  finally:
    _replacements.reset(token)


@contextlib.contextmanager
def record_calls() -> Iterator[dict[str, Call]]:
  """Gives a dict that gets the calls of Pallas kernels that are traced in the block, by their keys.

  The program has XLA's forms in their place, so that a kernel that cannot even be traced is in the list and ends nothing.
  """
  calls: dict[str, Call] = {}
  token = _recorded.set(calls)
  try:
    yield calls
  finally:
    _recorded.reset(token)


def run(kernel: str, function: str, name: str, *args: Any) -> Any:
  """What `function` of `kernels/<kernel>/<name>.py` makes of `args`.

  Args:
    name: one of IMPLEMENTATIONS; "pallas": the platform's own kernel; "auto": likewise, and XLA's where there is none,
      where it does not do these shapes, which is logged once, or where `replace_kernels` says so.

  Raises:
    ValueError: there is none of that name, or on this platform none.
    Unsupported: the one that was named does not do these shapes, or is replaced.
  """
  call = Call(kernel, function, chosen(kernel, name), jax.tree.map(_abstract, args))
  if not call.file.startswith("pallas"):
    return load_function(kernel, function, call.file)(*args)
  if call in _replacements.get():
    if name == "auto":
      return load_function(kernel, function, "xla")(*args)
    raise Unsupported(f"the self-test replaced {call.name}")
  try:
    if (recorded := _recorded.get()) is None:
      return load_function(kernel, function, call.file)(*args)
    if call.key not in recorded:
      _record(call, args, recorded)
  except Unsupported as e:
    if name != "auto":
      raise
    log_once(f"{call.name}: falling back to XLA: {e}")
  return load_function(kernel, function, "xla")(*args)


def _record(call, args, recorded):
  """Adds `call` to `recorded`. Raises Unsupported as its kernel does; what else it raises is for the self-test to find."""
  try:
    load_function(call.kernel, call.function, call.file)(*args)
  except Unsupported:
    raise
  except Exception as e:
    _log.info("%s: %s", call.key, e)
  recorded[call.key] = call


def chosen(kernel: str, name: str) -> str:
  """The file, of IMPLEMENTATIONS, that `run` takes of `kernel` for `name`. Raises ValueError as `run` does."""
  there = [file for file in IMPLEMENTATIONS if importlib.util.find_spec(f"deepseek_jax.kernels.{kernel}.{file}")]
  native = native_file(device_kind())
  native = native if native in there else None
  if name == "pallas" and native is None:
    raise ValueError(f"{kernel}: no Pallas kernel for {device_kind()}: use auto or xla")
  if name not in (*there, "auto", "pallas"):
    raise ValueError(f"{kernel} has no implementation {name!r}: use auto, pallas, {', '.join(there)}")
  return native or "xla" if name in ("auto", "pallas") else name


def import_libraries():
  """Imports what this platform's kernels call, before a program is traced.

  tokamax changes settings of jax when it is imported, and jax then traces again what it has traced: V3's step twice (jax 0.12).
  """
  if native_file(device_kind()) == "pallas_gpu":
    load_function("attention", "import_library", "pallas_gpu")()


def device_kind() -> str:
  """Of the devices that the program is traced for, such as "cpu", "TPU v5", "NVIDIA H200"."""
  return (jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]).device_kind


def native_file(device_kind: str) -> str | None:
  """The file of a platform's own kernels, or None: those for GPUs are for Hopper's tensor cores."""
  if device_kind.startswith("TPU"):
    return "pallas_tpu"
  return "pallas_gpu" if is_hopper(device_kind) else None


def is_hopper(device_kind: str) -> bool:
  return bool(re.search(r"\bG?H\d+\b", device_kind))


def load_function(kernel: str, function: str, file: str) -> Callable:
  """`function` of `kernels/<kernel>/<file>.py`."""
  # Imported where used: Pallas adds 0.3 s to the start of a program (2 cores of a shared machine).
  return getattr(importlib.import_module(f"deepseek_jax.kernels.{kernel}.{file}"), function)


@functools.cache
def log_once(message: str):
  _log.warning(message)


def vary(*trees):
  """`trees` typed as varying over all manual axes that any of their arrays varies over, as loops over them need it.

  The transpose of this cast is the sum of the gradients that the devices contribute.
  """
  varying = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in jax.tree.leaves(trees)))

  def leaf(a):
    missing = tuple(varying - jax.typeof(a).manual_axis_type.varying)
    return jax.lax.pcast(a, missing, to="varying") if missing else a

  return jax.tree.map(leaf, trees)


def _abstract(leaf):
  """Arrays that may be traced as their shape and dtype; NumPy's, which are constants of a program, and all else as is."""
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf


def _shown(x) -> str:
  if isinstance(x, jax.ShapeDtypeStruct):
    return f"{jax.numpy.dtype(x.dtype).name}[{','.join(map(str, x.shape))}]"
  if isinstance(x, np.ndarray):
    return f"{x.dtype}[{','.join(map(str, x.shape))}]#{zlib.crc32(x.tobytes()):08x}"
  if isinstance(x, tuple):
    return f"({', '.join(map(_shown, x))})"
  if hasattr(x, "tile"):  # a QTensor
    return f"{_shown(x.values)}/{x.tile[0]}x{x.tile[1]}"
  return jax.numpy.dtype(x).name if isinstance(x, (type, np.dtype)) else repr(x)
