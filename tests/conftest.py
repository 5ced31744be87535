"""Four virtual CPU devices for every test, set before jax is imported, compilations kept between runs, and buckets."""

import gc
import importlib.metadata
import os

import pytest

# Tracing makes millions of small objects that stay: looking for cycles among them often takes a tenth of the time.
gc.set_threshold(100_000, 20, 10)

_COUNT = "--xla_force_host_platform_device_count"
_flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = _flags if _COUNT in _flags else f"{_flags} {_COUNT}=4".strip()
# Compiling is most of what the tests do: without LLVM's optimization it takes a quarter of the time. HLO passes, and so
# layouts, collectives and the analyses that tests read, stay as they are.
_LEVEL = "--xla_backend_optimization_level"
if _LEVEL not in os.environ["XLA_FLAGS"]:
  os.environ["XLA_FLAGS"] += f" {_LEVEL}=0"
# So it does with XLA's older emitters of fusions, which write LLVM's code at once; jax 0.12 has none and refuses the
# flag.
if importlib.metadata.version("jaxlib") < "0.11":
  os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
  # One LLVM module for each program: cutting it in up to 32 that are compiled in parallel costs a tenth more CPU time.
  os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
# As cpu_backend.size_thread_pool does for programs: with a thread a core, collectives on virtual devices wait for one
# another.
os.environ.setdefault("NPROC", "16")
os.environ["JAX_PLATFORMS"] = "cpu"

_cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(_cache, "deepseek_jax", "test-compilations"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


# Folders whose every test depends on jax's version; other files say `pytestmark = pytest.mark.jax_version`.
JAX_VERSION = ("kernels", "end_to_end")
_workers = {}  # CPU seconds of the workers of xdist that have ended


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  for item in items:
    if item.path.parent.name in JAX_VERSION:
      item.add_marker(pytest.mark.jax_version)


def _cpu_seconds():
  """Of this process and of those that it started and waited for."""
  times = os.times()
  return times.user + times.system + times.children_user + times.children_system


def pytest_sessionfinish(session):
  if hasattr(session.config, "workeroutput"):
    session.config.workeroutput["cpu_seconds"] = _cpu_seconds()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
  _workers[node.gateway.id] = getattr(node, "workeroutput", {}).get("cpu_seconds", 0.0)


def pytest_terminal_summary(terminalreporter):
  times = os.times()
  # The children of a process with workers are the workers, which have counted themselves.
  total = times.user + times.system + sum(_workers.values()) if _workers else _cpu_seconds()
  terminalreporter.write_line(f"CPU time: {total / 60:.1f} minutes, of all processes")


@pytest.fixture(scope="session")
def bucket_server():
  """A server of gs:// and s3:// on this machine, and the environment that leads there; TensorStore reads it once."""
  from tests.bucket_server import Buckets

  with Buckets() as server, pytest.MonkeyPatch.context() as patch:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "AWS_REGION", "AWS_PROFILE"):
      patch.delenv(name, raising=False)
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
    patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
    patch.setenv("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "1")
    patch.setenv("AWS_ENDPOINT_URL", server.url)
    patch.setenv("AWS_ACCESS_KEY_ID", "key")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    yield server
    server.shutdown()


@pytest.fixture
def buckets(bucket_server, monkeypatch):
  """The server with one empty bucket, bucket-a, and little patience of ours with it."""
  from deepseek_jax import storage

  monkeypatch.setattr(storage, "RETRIES", {"max_retries": 2, "initial_delay": "20ms", "max_delay": "50ms"})
  bucket_server.heal()
  bucket_server.objects.clear()
  bucket_server.objects["bucket-a"] = {}
  yield bucket_server
  bucket_server.heal()
