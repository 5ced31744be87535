"""Topologies by name: devices, bandwidths, and errors."""

import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.plan.topology import parse_topology, peak_flops


@pytest.mark.parametrize(
  ("text", "devices", "slices"),
  [
    ("v5p:8x8x16", 1024, 1), ("2*v5p:8x8x8", 1024, 2), ("v5e:16x16", 256, 1), ("tpu7x:2x2x1", 8, 1), ("h100:64x8", 512, 1),
    ("h200", 1, 1), ("B200:4", 4, 1), ("v5p", 1, 1),
  ],
)  # fmt: skip
def test_sizes(text, devices, slices):
  topology = parse_topology(text)
  assert (topology.num_devices, topology.num_slices) == (devices, slices)


@pytest.mark.parametrize(
  ("text", "word"),
  [
    ("v9:2x2", "v5p"), ("v5p:8x8", "3 dimensions"), ("v5e:2x2x2", "2 dimensions"), ("h100:16x16", "at most 8"),
    ("2*h100:4x8", "nodes x GPUs"), ("v5p:0x2x2", "1 or more"), ("h100:12", "at most 8"), ("", "KIND:SHAPE"), ("v5p:", "KIND:SHAPE"),
  ],
)  # fmt: skip
def test_user_errors(text, word):
  with pytest.raises(ConfigError, match=word):
    parse_topology(text)


def test_collective_bandwidth():
  """All three dimensions of a torus have six links; of GPUs the network is slower, and eight cards are shared."""
  pod, gpus = parse_topology("v5p:8x8x8"), parse_topology("h100:64x8")
  link = pod.chip.link_bandwidth
  assert [pod.collective_bandwidth(n, 1) for n in (4, 8, 64, 512)] == [link, 2 * link, 4 * link, 6 * link]
  assert gpus.collective_bandwidth(8, 1) == 450e9 and gpus.collective_bandwidth(16, 1) == 8 * 50e9
  assert gpus.collective_bandwidth(64, 8) == 50e9  # one GPU of each node


def test_peak_flops_by_device_kind():
  kinds = {
    "NVIDIA H200": 989e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v6 lite": 918e12,
    "cpu": None,
  }
  assert {kind: peak_flops(kind) for kind in kinds} == kinds
