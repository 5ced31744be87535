"""Fakes an accelerator in the processes of a test. Its kernels are XLA's implementations with the faults of FAULTS.

sitecustomize.py imports it at their start. FAULTS: "kernel.function=fault,..". CHOICES: a folder in which each training
process writes which kernels fell back.
"""

import dataclasses
import json
import os
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
from jax._src import xla_bridge

from deepseek_jax.kernels import implementations

faults = dict(item.split("=") for item in os.environ["FAULTS"].split(",") if item)
load_function, lost = implementations.load_function, threading.Event()


def with_side_effect(action, result):
  """`result`; `action` is called when it is computed, and not when it is traced."""

  def callback(x):
    action()
    return x

  leaves, tree = jax.tree.flatten(result)
  leaves[0] = jax.pure_callback(callback, jax.ShapeDtypeStruct(leaves[0].shape, leaves[0].dtype), leaves[0])
  return jax.tree.unflatten(tree, leaves)


def rescale(result):
  """Doubles every scale of a QTensor; makes every other array a twentieth too large."""
  if hasattr(result, "scales"):
    return dataclasses.replace(result, scales=2 * result.scales)
  return jax.tree.map(lambda x: x * jnp.asarray(1.05, x.dtype), result)


def insert_nan(result):
  return jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), result)


def raise_error(result):
  raise ValueError("this kernel cannot be traced")


def crash_while_compiled(result):
  if threading.current_thread() is not threading.main_thread():
    os.kill(os.getpid(), signal.SIGSEGV)
  return result


def lose_device():
  lost.set()
  raise RuntimeError("an illegal memory access was encountered")


def hang():
  with open(os.path.join(os.environ["CHOICES"], "hanging"), "w") as f:
    f.write(str(os.getpid()))
  time.sleep(1000)


KINDS = {
  "lost": lambda result: with_side_effect(lose_device, result),
  "wrong": rescale,
  "nan": insert_nan,
  "exception": raise_error,
  "crash": lambda result: with_side_effect(lambda: os.kill(os.getpid(), signal.SIGABRT), result),
  "compiler": crash_while_compiled,
  "hang": lambda result: with_side_effect(hang, result),
  "slow": lambda result: with_side_effect(lambda: time.sleep(0.1), result),
}


def load(kernel, function, file):
  if file == "supports":
    return lambda *call: implementations.SUPPORTED
  if not file.startswith("pallas"):
    return load_function(kernel, function, file)
  xla, fault = load_function(kernel, function, "xla"), faults.get(f"{kernel}.{function}")
  return lambda *arguments: KINDS[fault](xla(*arguments)) if fault else xla(*arguments)


implementations.load_function = load
implementations.import_libraries = lambda: None
implementations.native_file = lambda device_kind: "pallas_gpu"

from deepseek_jax.selftest import check, machine, run, supervise  # noqa: E402  (they import what is replaced above)

for module in (machine, run):
  module.accelerators = lambda: ["a chip of a test"]
supervise.PHASE_TIMEOUTS["kernel"] = 4
run_selftest = run.run_selftest


def run_before_devices_are_opened(*arguments, **kwargs):
  report = run_selftest(*arguments, **kwargs)
  assert not xla_bridge.backends_are_initialized(), (
    "the process that trains opened its devices before the self-test ended"
  )
  return report


run.run_selftest = run_before_devices_are_opened
run.TIME_LIMIT = 150  # a busy machine compiles slowly
check.device_works = lambda: not lost.is_set()
check.SLOW_RATIO = 10  # times of small arrays on a busy machine differ by more than a tenth
if "deepseek_jax.train" in sys.orig_argv:  # others need not import the loop
  from deepseek_jax.training import loop

  replace_kernels = loop.replace_kernels

  def replace_and_record(replacements):
    path = os.path.join(os.environ["CHOICES"], os.environ.get("JAX_PROCESS_ID", "0"))
    with open(path, "w") as f:
      json.dump([sorted(replacements.functions), sorted(replacements.calls)], f)
    return replace_kernels(replacements)

  loop.replace_kernels = replace_and_record
