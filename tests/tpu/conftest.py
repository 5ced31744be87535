"""Programs are compiled for TPUs, none of which is here: libtpu is told so, and to say its warnings on stderr."""

import importlib.util
import os

import pytest

MISSING = importlib.util.find_spec("libtpu") is None
if not MISSING:  # otherwise nothing here runs, and what does must not notice
  os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",  # no metadata server to ask
    "TPU_WORKER_HOSTNAMES": "localhost",  # or it says an error
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # by several test processes
    # Its warnings go to a file in /tmp/tpu_logs by default, and a test that looks for one on stderr would always pass.
    "TPU_STDERR_LOG_LEVEL": "1",
    # What is compiled without a TPU can be written to the cache and not be read back: each hit is a warning and a compile.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
  }


def pytest_collection_modifyitems(items):
  for item in items:
    if item.path.parent.name == "tpu":
      item.add_marker(pytest.mark.tpu)
      if MISSING:
        item.add_marker(pytest.mark.skip(reason="libtpu is not installed: pip install 'jax[tpu]'"))
