"""Compiled programs are kept in the user's cache folder by jax's compilation cache, so that the next start has them."""

import hashlib
import os
import pathlib
import platform
import shutil
import sys
import tempfile
import time
import warnings
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import jaxlib
from jax.experimental.compilation_cache import compilation_cache

from deepseek_jax.config_sections import DataConfig
from deepseek_jax.console import current_console
from deepseek_jax.data.cache import cache_root
from deepseek_jax.native_logs import stderr_to

MIN_COMPILE_SECONDS = 0.2  # programs that compile faster are not kept
MAX_BYTES = 2 * 2**30  # of one folder
MAX_UNUSED_SECONDS = 60 * 24 * 3600  # folders of other versions, flags or CPUs that were not used for so long go
ACCEPTED, REFUSED = "accepted", "refused"  # files that say whether XLA loads what it has stored


_compilations = 0


def _listen(event: str, duration_secs: float, **metadata: Any) -> None:
  global _compilations
  _compilations += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_listen)


def count_compilations() -> int:
  """Programs that were compiled, or loaded from the cache, in this process since this module was imported."""
  return _compilations


def use_compilation_cache() -> None:
  """Has jax keep compiled programs in the user's cache folder, for this process. To be called once devices are there.

  Nothing is changed where jax has a cache already, as by JAX_COMPILATION_CACHE_DIR, or JAX_ENABLE_COMPILATION_CACHE=0.
  Where there can be no cache, the console shows one line, and programs are compiled at each start.
  """
  if jax.config.values["jax_compilation_cache_dir"] or not jax.config.values["jax_enable_compilation_cache"]:
    return
  folder = cache_root(DataConfig()) / "compilations" / _key()
  try:
    problem = _prepare(folder)
  except OSError as error:
    problem = f"{error.filename or folder}: {error.strerror}"
  if problem:
    current_console().print(f"programs are compiled at each start, without a cache: {problem}", err=True)
    return
  _set_folder(str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
  if jax.default_backend() == "cpu" and not _is_accepted(folder):
    _set_folder(None)
    current_console().print(
      f"programs are compiled at each start, without a cache: XLA of jax {jax.__version__} does not load on this CPU what "
      "it has stored (openxla/xla issue 44565)",
      err=True,
    )


def _key() -> str:
  """Of all that compiled programs depend on beside themselves: versions, flags, and what this CPU can do.

  jax's own keys have versions and flags too; XLA checks the CPU only when it loads a program.
  """
  flags = [f"{name}={os.environ.get(name)}" for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
  text = "\n".join([jax.__version__, jaxlib.__version__, *flags, platform.machine(), _cpu_features()])
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _cpu_features() -> str:
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.processor()
  return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _set_folder(folder: str | None) -> None:
  jax.config.update("jax_compilation_cache_dir", folder)
  compilation_cache.reset_cache()  # jax looks for the folder only once


def _prepare(folder: pathlib.Path) -> str:
  """Makes `folder`, or removes what is old in it and beside it. Returns why it cannot be used, or "".

  What is in it is machine code that will be run, so nobody else may write there.
  """
  folder.parent.parent.mkdir(parents=True, exist_ok=True)
  for path in (folder.parent, folder):
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
      return f"others may write to {path}; remove it, or name another folder in JAX_COMPILATION_CACHE_DIR"
  os.utime(folder)
  for other in folder.parent.iterdir():
    if time.time() - other.stat().st_mtime > MAX_UNUSED_SECONDS:
      shutil.rmtree(other, ignore_errors=True)  # another process may have removed it
  entries = sorted((entry.stat().st_mtime, entry.stat().st_size, entry) for entry in folder.iterdir())
  excess = sum(size for _, size, _ in entries) - MAX_BYTES
  for _, size, entry in entries:  # the oldest first
    if excess <= 0:
      break
    entry.unlink(missing_ok=True)
    excess -= size
  return ""


def _is_accepted(folder: pathlib.Path) -> bool:
  """Whether XLA loads programs from `folder`. It is tried once: a file in the folder has the answer."""
  if not (folder / ACCEPTED).exists() and not (folder / REFUSED).exists():
    (folder / (ACCEPTED if _loads_what_it_stored() else REFUSED)).touch()
  return (folder / ACCEPTED).exists()


def _loads_what_it_stored() -> bool:
  """Whether XLA stores a small program and then loads it without a complaint, which it writes to stderr."""
  least = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  with tempfile.TemporaryFile() as file, warnings.catch_warnings(record=True) as complaints:
    sys.stderr.flush()
    try:
      with stderr_to(file):
        for _ in range(2):  # compiled and stored, then loaded
          jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.ones((8, 8))).compile()
    finally:
      jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    file.seek(0)
    return not complaints and not file.read().strip()
