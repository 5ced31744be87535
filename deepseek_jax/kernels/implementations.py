"""Which implementation of a kernel runs, and types that all of them need inside shard_map."""

import functools
import importlib.util
import logging
import re

import jax

IMPLEMENTATIONS = ("xla", "reference", "pallas_tpu", "pallas_gpu")  # files in a kernel's folder
_log = logging.getLogger(__name__)


class Unsupported(ValueError):
  """An implementation does not do what is asked; the message says what it does, and names the shapes that came."""


def run(kernel, function, name, *args):
  """What `function` of `kernels/<kernel>/<name>.py` makes of `args`.

  Args:
    name: one of IMPLEMENTATIONS; "pallas": the platform's own kernel; "auto": likewise, and XLA's where there is none or
      where it does not do these shapes, which is logged once.

  Raises:
    ValueError: there is none of that name, or on this platform none.
    Unsupported: the one that was named does not do these shapes.
  """
  try:
    return _function(kernel, function, chosen(kernel, name))(*args)
  except Unsupported as e:
    if name != "auto":
      raise
    log_once(f"{kernel}: as XLA makes it, since {e}")
    return _function(kernel, function, "xla")(*args)


def chosen(kernel, name):
  """The file, of IMPLEMENTATIONS, that `run` takes of `kernel` for `name`. Raises ValueError as `run` does."""
  there = [file for file in IMPLEMENTATIONS if importlib.util.find_spec(f"deepseek_jax.kernels.{kernel}.{file}")]
  native = _native(device_kind())
  native = native if native in there else None
  if name == "pallas" and native is None:
    raise ValueError(f"{kernel}: no Pallas kernel for {device_kind()}: use auto or xla")
  if name not in (*there, "auto", "pallas"):
    raise ValueError(f"{kernel} has no implementation {name!r}: use auto, pallas, {', '.join(there)}")
  return native or "xla" if name in ("auto", "pallas") else name


def device_kind():
  """Of the devices that the program is traced for, such as "cpu", "TPU v5", "NVIDIA H200"."""
  return (jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]).device_kind


def _native(device_kind):
  """The file of a platform's own kernels, or None: those for GPUs are for Hopper's tensor cores."""
  if device_kind.startswith("TPU"):
    return "pallas_tpu"
  return "pallas_gpu" if is_hopper(device_kind) else None


def is_hopper(device_kind) -> bool:
  return bool(re.search(r"\bG?H\d+\b", device_kind))


def _function(kernel, function, name):
  # Imported where used: Pallas adds 0.3 s to the start of a program (2 cores of a shared machine).
  return getattr(importlib.import_module(f"deepseek_jax.kernels.{kernel}.{name}"), function)


@functools.cache
def log_once(message):
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
