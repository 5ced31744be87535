"""Programs are compiled for TPUs, none of which is here: libtpu is told so, and to say its warnings on stderr."""

import os

import pytest

from deepseek_jax.plan.topology import COMPILER_ENVIRONMENT, can_compile

MISSING = not can_compile()
if not MISSING:  # otherwise nothing here runs, and what does must not notice
  os.environ |= COMPILER_ENVIRONMENT


def pytest_collection_modifyitems(items):
  for item in items:
    if item.path.parent.name == "tpu":
      item.add_marker(pytest.mark.tpu)
      if MISSING:
        item.add_marker(pytest.mark.skip(reason="libtpu is not installed: pip install 'jax[tpu]'"))
