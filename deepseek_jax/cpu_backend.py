"""XLA on CPUs: how many threads it has, whose memory its buffers are, and how much it optimizes."""

import ctypes
import os
import re
import sys
from collections.abc import MutableMapping

from deepseek_jax.console import current_console

# Of mallopt(3), <malloc.h>: blocks of up to 1 GiB come from the heap, which is not given back below 2 GiB, and all
# threads share the heap, since those of their own are mapped again for large blocks.
MALLOC_OPTIONS = {"M_MMAP_THRESHOLD": (-3, 2**30), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_ARENA_MAX": (-8, 1)}
KEEP_FREED_MEMORY = "DEEPSEEK_JAX_KEEP_FREED_MEMORY"  # the environment variable; "0": leave malloc as it is


def size_thread_pool(environment: MutableMapping[str, str]) -> None:
  """Sizes XLA's CPU thread pool for virtual devices; to be called before jax is imported.

  XLA:CPU starts independent collectives of a program at once, and each waits in a thread of a pool that is as large as
  the number of cores, or NPROC: with more virtual devices than cores they wait for one another until XLA aborts
  (measured on jax 0.10.2, 4 devices on 2 cores: 4 of 4 runs; none of 6 with NPROC=16).
  """
  found = re.search(r"host_platform_device_count=(\d+)", environment.get("XLA_FLAGS", ""))
  devices = int(found[1] if found else environment.get("JAX_NUM_CPU_DEVICES") or 1)
  if devices > 1:
    environment.setdefault("NPROC", str(4 * devices))


def keep_freed_memory() -> bool:
  """Has malloc keep what is freed, for this process, and returns whether it does.

  XLA:CPU allocates the buffers of a program each time it runs. By default glibc maps large ones anew, and each page of
  theirs is a page fault when it is first written. To be called before arrays are made, on the CPU backend only: hosts of
  accelerators gain nothing, and share the heap among threads that load data. Only glibc has these options.
  """
  if os.environ.get(KEEP_FREED_MEMORY, "1") == "0" or not _is_glibc():
    return False
  libc = ctypes.CDLL(None)
  refused = [name for name, (option, value) in MALLOC_OPTIONS.items() if not libc.mallopt(option, value)]
  if refused:
    current_console().print(f"malloc refused {', '.join(refused)}: steps on this CPU may be slower", err=True)
  return not refused


def quick_compile_options() -> dict[str, int] | None:
  """`compiler_options` of `jax.jit` for a program that runs once; to be called when devices are open.

  On CPUs LLVM optimizes nothing then, which takes longer than such a program runs: the parameters of up to about 60M are
  made sooner so, larger models' later (measured with v3_24m: 2.1 s to compile and 1.4 to run instead of 4.8 and 0.3).
  """
  import jax  # not before `size_thread_pool`

  return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


def _is_glibc() -> bool:
  if not sys.platform.startswith("linux"):
    return False
  try:
    return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
  except ValueError:  # a libc that does not know the name
    return False
