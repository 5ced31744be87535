"""Marks that several files of tests share."""

import jax
import pytest

# Pallas's interpreter of GPU threads, and what Hopper's kernels use of it, came with jax 0.11.
NEEDS_JAX_0_11 = pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason=f"kernels for GPUs need jax 0.11 or newer, and this is {jax.__version__}"
)
