"""Compilation for TPU topologies: errors of XLA. Compilation itself is tested in tests/tpu."""

import pytest

from deepseek_jax.plan.compile import parse_required_bytes
from deepseek_jax.plan.topology import GIB


@pytest.mark.parametrize(
  ("message", "required_bytes"),
  [
    ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded", 20.5 * GIB),
    ("Used 95.74G of 95.74G hbm.", 95.74 * GIB + 1),
    (
      "memory required for HLO temporaries (204.50G) exceeds available HBM (95.73G). HLO module: jit_step.",
      204.5 * GIB,
    ),
    ("INTERNAL: RET_CHECK failure", None),
  ],
)
def test_required_bytes_of_an_out_of_memory_error(message, required_bytes):
  assert parse_required_bytes(message) == (required_bytes and int(required_bytes))
