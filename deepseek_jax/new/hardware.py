"""What a new config is for: this machine, or a topology that `plan` knows."""

import dataclasses
import math
import os
import time

from deepseek_jax.errors import ConfigError
from deepseek_jax.plan.topology import CHIPS, Topology, chip_name, has_bfloat16_units, parse_topology

HERE = "here"
# Of a timed matrix product of 1024 x 1024 x 1024, what a training step reaches where there is no roofline: it grows
# with the width up to FULL_WIDTH. In CPU time on 2 cores of an AMD EPYC, float32: 0.16 (dense) and 0.12 (mixture of experts) at
# a width of 64, 0.51 at 192 (tiny_dense).
LARGEST_FRACTION, FULL_WIDTH = 0.5, 192
# The rest is for the data, the program, and whatever else runs on a machine that is somebody's.
CPU_MEMORY_FRACTION = 0.5


@dataclasses.dataclass(frozen=True)
class Hardware:
  """Devices of one kind.

  Attributes:
    text: as the user named it.
    description: for people.
    topology: None where no roofline is known: CPUs, and accelerators that are not in CHIPS.
    memory: bytes of one device that a training step may use; 0: not known.
    compute_dtype: what it multiplies fastest.
  """

  text: str
  description: str
  topology: Topology | None
  num_devices: int
  memory: float
  compute_dtype: str
  is_cpu: bool = False

  @property
  def num_slices(self) -> int:
    """TPU slices, which a data-center network connects."""
    return self.topology.num_slices if self.topology else 1


def find_hardware(text: str) -> Hardware:
  """The hardware that `text` names: "here", or a topology as `plan` takes it. Raises ConfigError for other text."""
  if text.lower() == HERE:
    return this_machine()
  try:
    topology = parse_topology(text)
  except ConfigError as error:
    raise ConfigError(f"{str(error).removeprefix(f'--topology={text}: ')}; or {HERE}, for this machine") from None
  return of_topology(text, topology)


def of_topology(text: str, topology: Topology, found: str = "") -> Hardware:
  """The hardware of a topology. found: how it was found, for people."""
  devices = topology.num_devices
  description = f"{found}{topology.text} ({devices:,} x {topology.chip.kind})"
  return Hardware(text, description, topology, devices, topology.chip.hbm_capacity, "bfloat16")


def this_machine() -> Hardware:
  """The devices that JAX finds here."""
  import jax

  devices = jax.devices()
  first = devices[0]
  if first.platform == "cpu":
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    description = f"this machine ({os.cpu_count()} CPU cores, {ram / 2**30:.0f} GiB)"
    memory = CPU_MEMORY_FRACTION * ram / len(devices)
    return Hardware(HERE, description, None, len(devices), memory, "float32", is_cpu=True)
  name = chip_name(first.device_kind)
  if name:
    topology = parse_topology(local_topology(name, len(devices)))
    return of_topology(HERE, topology, "this machine, ")
  memory = (first.memory_stats() or {}).get("bytes_limit", 0)
  description = f"this machine ({len(devices)} x {first.device_kind})"
  return Hardware(HERE, description, None, len(devices), memory, "bfloat16" if has_bfloat16_units(first) else "float32")


def local_topology(name: str, devices: int) -> str:
  """The topology, as text, of that many devices of a chip in one machine: "h100:1x8", "v5e:2x4"."""
  chip = CHIPS[name]
  if not chip.torus_dims:
    nodes = -(-devices // chip.gpus_per_node)
    return f"{name}:{nodes}x{devices // nodes}"
  left, shape = max(1, devices // chip.devices_per_package), []
  for dims_left in range(chip.torus_dims, 0, -1):  # as near to a cube as whole sides allow
    side = max(side for side in range(1, left + 1) if left % side == 0 and side**dims_left <= left)
    shape.append(left if dims_left == 1 else side)
    left //= side
  return f"{name}:{'x'.join(map(str, sorted(shape)))}"


def step_fraction(embed: int) -> float:
  """The fraction of `timed_flops` that a training step of a model of this width is expected to reach."""
  return LARGEST_FRACTION * min(1.0, embed / FULL_WIDTH)


def timed_flops(hardware: Hardware) -> float:
  """FLOP/s of a large matrix product on the devices of this machine, timed now."""
  import jax
  import jax.numpy as jnp

  size = 1024 if hardware.is_cpu else 8192
  matrix = jnp.ones((size, size), hardware.compute_dtype)
  product = jax.jit(jnp.matmul)
  product(matrix, matrix).block_until_ready()
  best = math.inf
  for _ in range(10):
    start = time.perf_counter()
    product(matrix, matrix).block_until_ready()
    best = min(best, time.perf_counter() - start)
  # Virtual devices of a CPU share its cores.
  return 2 * size**3 / best * (1 if hardware.is_cpu else hardware.num_devices)
