"""TPU and GPU topologies: peak FLOP/s, HBM and interconnect bandwidth of a chip, and how chips are connected.

Numbers are from the vendors' data sheets and Google's TPU pages. Bandwidths count one direction. GPUs have one 400
Gbit/s network card each.
"""

import dataclasses
import importlib.util
import math
import re
from typing import Any

from deepseek_jax.errors import ConfigError

GIB = 2**30

# Set these before jax is imported, so that libtpu compiles on a machine without a TPU.
COMPILER_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server
  "TPU_WORKER_HOSTNAMES": "localhost",  # libtpu reports an error without it
  "TPU_ACCELERATOR_TYPE": "v5p-8",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at once
  "TPU_STDERR_LOG_LEVEL": "1",  # warnings to stderr and not to a file
  # JAX's compilation cache cannot read back what was compiled without a TPU: each hit is a warning and a new
  # compilation.
  "JAX_ENABLE_COMPILATION_CACHE": "false",
}


def can_compile() -> bool:
  """Whether libtpu is installed."""
  return importlib.util.find_spec("libtpu") is not None


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device as jax counts them.

  FP8 speedups are the rate of FP8 GEMMs over the rate of bfloat16 GEMMs, with scales every 128, 256 and 512 terms:
  - TPUs: from the length of the kernels' steps (tests/kernels/bundles.json; v5e is taken for a v5p).
  - Hopper: what DeepGEMM reaches (1410e12 on an H800) over bfloat16 (788e12 on an H200). This project's kernels have
    not been timed.
  - Others: 1, since XLA multiplies in bfloat16. HBM bytes are counted as for FP8 kernels all the same.
  """

  kind: str  # jax's `device_kind`
  peak_flops: float  # dense bfloat16, FLOP/s
  hbm_capacity: float  # bytes that a program can have
  hbm_bandwidth: float  # bytes/s
  link_bandwidth: float  # bytes/s, one way, of one link of a TPU torus (ICI), or of NVLink
  network_bandwidth: float  # bytes/s, one way, of a device's share of the data-center network
  torus_dims: int = 0  # 0 for GPUs
  gpus_per_node: int = 8  # GPUs that share NVLink
  devices_per_package: int = 1  # a topology counts packages
  fp8_speedups: tuple[float, float, float] = (1.0, 1.0, 1.0)

  def fp8_speedup(self, block: int) -> float:
    """FP8 over bfloat16 GEMM rate with a scale every `block` terms: 128, 256 or 512."""
    return dict(zip((128, 256, 512), self.fp8_speedups, strict=True))[block]


CHIPS = {
  "v4": Chip("TPU v4", 275e12, 31.75 * GIB, 1.23e12, 45e9, 6.25e9, torus_dims=3),
  "v5e": Chip("TPU v5 lite", 197e12, 15.75 * GIB, 0.82e12, 45e9, 3.1e9, torus_dims=2, fp8_speedups=(0.93, 0.94, 1.05)),
  "v5p": Chip("TPU v5p", 459e12, 95.74 * GIB, 2.77e12, 90e9, 6.25e9, torus_dims=3, fp8_speedups=(0.93, 0.94, 1.05)),
  "v6e": Chip("TPU v6e", 918e12, 31.25 * GIB, 1.64e12, 90e9, 12.5e9, torus_dims=2, fp8_speedups=(0.61, 0.99, 1.08)),
  "tpu7x": Chip(
    "TPU7x",
    1153.5e12,
    94.75 * GIB,
    3.69e12,
    90e9,
    12.5e9,
    torus_dims=3,
    devices_per_package=2,
    fp8_speedups=(0.47, 0.79, 1.0),
  ),
  "a100": Chip("A100", 312e12, 79 * GIB, 2.04e12, 300e9, 25e9),
  "h100": Chip("H100", 989e12, 79 * GIB, 3.35e12, 450e9, 50e9, fp8_speedups=(1.79, 1.0, 1.0)),
  "h800": Chip("H800", 989e12, 79 * GIB, 3.35e12, 200e9, 50e9, fp8_speedups=(1.79, 1.0, 1.0)),
  "h200": Chip("H200", 989e12, 140 * GIB, 4.8e12, 450e9, 50e9, fp8_speedups=(1.79, 1.0, 1.0)),
  "b200": Chip("B200", 2250e12, 178 * GIB, 8e12, 900e9, 50e9),
}
_TOPOLOGY_PATTERN = re.compile(r"(?:(\d+)\*)?([a-z]\w*)(?::(\d+(?:x\d+)*))?")


@dataclasses.dataclass(frozen=True)
class Topology:
  """`num_slices` equal slices of `shape` packages of `chip`.

  On GPUs, `shape` is (nodes, GPUs per node), with one slice.
  """

  text: str  # as the user wrote it
  chip_name: str  # a key of CHIPS
  chip: Chip
  num_slices: int
  shape: tuple[int, ...]

  @property
  def num_devices(self) -> int:
    return self.num_slices * math.prod(self.shape) * self.chip.devices_per_package

  @property
  def is_tpu(self) -> bool:
    return self.chip.torus_dims > 0

  def collective_bandwidth(self, group_size: int, stride: int, all_to_all: bool = False) -> float:
    """Bytes/s that a device sends in a collective within a slice.

    On a torus, the group has two links in each dimension that it spans, or one where it does not wrap around. GPUs of a
    node use NVLink. Between nodes, the network cards of the group's GPUs in a node share the work.

    Args:
      group_size: devices of the collective.
      stride: distance between them, in devices.
      all_to_all: each device sends different data to every other one. On a torus a message then crosses a quarter of
        the ring on average. Between nodes each GPU uses its own network card.
    """
    if not self.is_tpu:
      in_node = max(min(group_size, self.shape[-1] // stride), 1)
      if in_node >= group_size:
        return self.chip.link_bandwidth
      network = self.chip.network_bandwidth
      return network if all_to_all else min(self.chip.link_bandwidth, in_node * network)
    remaining, links, hops = group_size, 0, 1.0
    for side in sorted(self.shape, reverse=True):
      if remaining > 1:
        links += 2 if remaining >= side > 2 else 1
        hops = max(hops, min(remaining, side) / 4)
        remaining = -(-remaining // side)
    return links * self.chip.link_bandwidth / self.chip.devices_per_package / (hops if all_to_all else 1)


def parse_topology(text: str) -> Topology:
  """Parses `v5p:8x8x8` (chips), `2*v5p:8x8x8` (slices), `h100:64x8` (nodes x GPUs) or `h200` (one GPU).

  Raises:
    ConfigError: the text has another form, the chip is not known, or the shape does not exist.
  """
  match = _TOPOLOGY_PATTERN.fullmatch(text.lower())
  if not match or match[2] not in CHIPS:
    raise ConfigError(
      f"--topology={text}: expected KIND:SHAPE, such as v5p:8x8x8, 2*v5p:8x8x8 (slices) or h100:64x8 (nodes x GPUs), with "
      f"one of the kinds {', '.join(CHIPS)}"
    )
  num_slices, name, chip = int(match[1] or 1), match[2], CHIPS[match[2]]
  dims = chip.torus_dims
  shape = tuple(map(int, match[3].split("x"))) if match[3] else (1,) * max(dims, 1)
  if dims and match[3] and len(shape) != dims:
    raise ConfigError(
      f"--topology={text}: a {name} torus has {dims} dimensions; write, for example, {name}:{'x'.join(['4'] * dims)}"
    )
  if not dims and (num_slices > 1 or len(shape) > 2 or shape[-1] > chip.gpus_per_node):
    raise ConfigError(
      f"--topology={text}: expected nodes x GPUs per node, at most {chip.gpus_per_node}, such as "
      f"{name}:64x{chip.gpus_per_node}, or {name} for one GPU"
    )
  if 0 in (num_slices, *shape):
    raise ConfigError(f"--topology={text}: sizes must be 1 or more")
  return Topology(text, name, chip, num_slices, shape)


def chip_name(device_kind: str) -> str | None:
  """The key of CHIPS of a device by jax's `device_kind`; None where it is not known (CPUs)."""
  kind = {"TPU v5": "TPU v5p", "TPU v5e": "TPU v5 lite", "TPU v6 lite": "TPU v6e"}.get(device_kind, device_kind)
  return next((name for name, chip in CHIPS.items() if chip.kind in kind), None)


def has_bfloat16_units(device: Any) -> bool:
  """Whether a GPU, a jax.Device, multiplies bfloat16: NVIDIA's do from Ampere (compute capability 8.0) on, so that a T4 does not."""
  capability = str(getattr(device, "compute_capability", ""))
  return not re.fullmatch(r"[1-7](\.\d+)?", capability)  # of other makers it is a name, as gfx90a


def peak_flops(device_kind: str) -> float | None:
  """Peak bfloat16 FLOP/s of a device by jax's `device_kind`, or None where it is not known (CPUs)."""
  name = chip_name(device_kind)
  return CHIPS[name].peak_flops if name else None
