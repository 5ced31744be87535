"""Every kernel compiled for TPUs without the hardware, and no step of one longer than before."""

import json

import pytest

from deepseek_jax.plan.topology import can_compile
from tests.kernels.bundles import TABLE, TOPOLOGIES, counts, libtpu

pytestmark = [
  pytest.mark.kernels,
  pytest.mark.skipif(not can_compile(), reason="libtpu is not installed: pip install 'jax[tpu]'"),
]


@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_steps_are_no_longer_than_before(chip):
  found, table = counts(chip), json.loads(TABLE.read_text())
  if libtpu() not in table:
    pytest.skip(
      f"all compile; {TABLE.name} has no counts of libtpu {libtpu()}: python -m tests.kernels.bundles adds them"
    )
  before = table[libtpu()][chip]
  assert found.keys() == before.keys()
  assert not {name: (n, before[name]) for name, n in found.items() if n > before[name]}
