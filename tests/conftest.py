"""Four virtual CPU devices for every test, set before jax is imported, and compilations kept between runs."""

import os

_COUNT = "--xla_force_host_platform_device_count"
_flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = _flags if _COUNT in _flags else f"{_flags} {_COUNT}=4".strip()
# Compiling is most of what the tests do: without LLVM's optimisation it takes a quarter of the time. HLO passes, and so
# layouts, collectives and the analyses that tests read, stay as they are.
_LEVEL = "--xla_backend_optimization_level"
if _LEVEL not in os.environ["XLA_FLAGS"]:
  os.environ["XLA_FLAGS"] += f" {_LEVEL}=0"
# As flags.enough_threads does for programs: with a thread a core, collectives on virtual devices wait for one another.
os.environ.setdefault("NPROC", "16")
os.environ["JAX_PLATFORMS"] = "cpu"

_cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(_cache, "deepseek_jax", "test-compilations"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
