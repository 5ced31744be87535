"""What a new config is for: topologies, this machine, and accelerators that are and are not known."""

import types

import jax
import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.new.hardware import FULL_WIDTH, find_hardware, local_topology, step_fraction, timed_flops


def test_a_topology():
  hardware = find_hardware("2*v5p:4x4x4")
  assert (hardware.num_devices, hardware.num_slices, hardware.compute_dtype) == (128, 2, "bfloat16")
  with pytest.raises(ConfigError, match="^expected KIND:SHAPE, .*; or here, for this machine$"):
    find_hardware("toaster")


@pytest.mark.parametrize(
  ("name", "devices", "text"),
  [
    ("h100", 1, "h100:1x1"),
    ("h100", 8, "h100:1x8"),
    ("a100", 16, "a100:2x8"),
    ("v5e", 1, "v5e:1x1"),
    ("v5e", 8, "v5e:2x4"),
    ("v5p", 4, "v5p:1x2x2"),
    ("tpu7x", 8, "tpu7x:1x2x2"),
  ],
)
def test_devices_of_one_machine_as_a_topology(name, devices, text):
  assert local_topology(name, devices) == text
  assert find_hardware(text).num_devices == devices


def test_this_machine_is_a_cpu():
  hardware = find_hardware("HERE")
  assert hardware.is_cpu and hardware.topology is None and hardware.compute_dtype == "float32"
  assert hardware.num_devices == len(jax.devices()) and hardware.memory > 2**28
  assert 1e8 < timed_flops(hardware) < 1e14
  assert step_fraction(FULL_WIDTH // 2) == step_fraction(FULL_WIDTH) / 2 == step_fraction(10**6) / 2


@pytest.mark.parametrize(
  ("kind", "capability", "topology", "dtype"),
  [
    ("NVIDIA H200", "9.0", "h200:1x2", "bfloat16"),
    ("Tesla T4", "7.5", None, "float32"),
    ("NVIDIA L40S", "8.9", None, "bfloat16"),
  ],
)
def test_gpus_of_this_machine(monkeypatch, kind, capability, topology, dtype):
  gpu = types.SimpleNamespace(
    platform="gpu", device_kind=kind, compute_capability=capability, memory_stats=lambda: {"bytes_limit": 12e9}
  )
  monkeypatch.setattr(jax, "devices", lambda: [gpu, gpu])
  hardware = find_hardware("here")
  assert (hardware.topology.text if hardware.topology else None) == topology
  assert (hardware.num_devices, hardware.compute_dtype, hardware.is_cpu) == (2, dtype, False)
  assert topology or hardware.memory == 12e9
