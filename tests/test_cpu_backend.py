import ctypes
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from deepseek_jax import cpu_backend
from deepseek_jax.cpu_backend import keep_freed_memory, quick_compile_options, size_thread_pool

# Writes 64 MiB to new memory and frees it, ten times, and prints the page faults.
PROGRAM = """
import ctypes, resource
from deepseek_jax.cpu_backend import keep_freed_memory
kept = keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
for i in range(11):
  if i == 1:
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  block = libc.malloc(2**26)
  ctypes.memset(block, 1, 2**26)
  libc.free(block)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
"""


def test_virtual_devices_get_threads_enough_for_their_collectives():
  for given, wanted in (
    ({}, None),
    ({"XLA_FLAGS": "--a --xla_force_host_platform_device_count=4"}, "16"),
    ({"JAX_NUM_CPU_DEVICES": "8"}, "32"),
    ({"JAX_NUM_CPU_DEVICES": "8", "NPROC": "5"}, "5"),
  ):
    size_thread_pool(given)
    assert given.get("NPROC") == wanted


@pytest.mark.skipif(not cpu_backend._is_glibc(), reason="malloc of glibc")
def test_freed_memory_is_kept_unless_the_environment_says_no():
  def faults(**environment):
    command = [sys.executable, "-c", PROGRAM]
    output = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True).stdout
    kept, count = output.split()
    return kept == "True", int(count)

  kept, few = faults()
  assert kept and few < 200
  kept, many = faults(**{cpu_backend.KEEP_FREED_MEMORY: "0"})
  assert not kept and many > 10 * few


def test_a_refusal_is_one_line(monkeypatch, capsys):
  class Libc:
    def mallopt(self, option, value):
      return option != -8

  monkeypatch.setattr(ctypes, "CDLL", lambda name: Libc())
  monkeypatch.setattr(cpu_backend, "_is_glibc", lambda: True)
  assert not keep_freed_memory()
  assert capsys.readouterr().err == "malloc refused M_ARENA_MAX: steps on this CPU may be slower\n"


def test_another_libc_is_left_alone(monkeypatch):
  monkeypatch.setattr(sys, "platform", "darwin")
  assert not keep_freed_memory()


def test_a_program_that_runs_once_computes_the_same_without_optimizations(monkeypatch):
  def draw(options):
    return jax.jit(lambda key: jax.random.normal(key, (64,)), compiler_options=options)(jax.random.key(0))

  options = quick_compile_options()
  assert options  # which XLA knows: another key would be an error
  np.testing.assert_allclose(draw(options), draw(None), rtol=1e-6)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert quick_compile_options() is None
