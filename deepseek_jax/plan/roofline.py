"""Step time by a roofline: FLOPs, HBM bytes and collective bytes over the rates of the chip and its interconnect.

- Ideal: compute, HBM and interconnect each at their peak and fully overlapped. The slowest of the three is the step
  time.
- Calibrated: operations run one after the other, each at a fraction of its peak. Part of the interconnect time is
  overlapped.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from deepseek_jax.plan.count import Operation
from deepseek_jax.plan.topology import Chip, Topology


@dataclasses.dataclass(frozen=True)
class Efficiency:
  """Fractions of the peaks that a step reaches, by kind of operation.

  overlap: fraction of the interconnect time that compute hides.

  Large bfloat16 matmuls reach about 80% of the peak on TPUs and on Hopper, long copies about as much of the HBM
  bandwidth. Grouped matmuls and fused attention are known for about half. None of these numbers was measured in this
  project. They give the MFU that maxtext publishes for V3 on 512 v5p chips within a tenth (tests/plan/test_plan.py).
  """

  matmul: float = 0.8
  grouped_matmul: float = 0.5
  fused_attention: float = 0.5
  hbm: float = 0.8
  interconnect: float = 0.8
  overlap: float = 0.6

  def of_kind(self, kind: str) -> float:
    """Fraction of the peak FLOP/s that operations of an `Operation.kind` with FLOPs reach."""
    return {
      "matmul": self.matmul,
      "grouped matmul": self.grouped_matmul,
      "fused attention": self.fused_attention,
      "memory": self.hbm,
    }[kind]


@dataclasses.dataclass(frozen=True)
class StepTime:
  """Seconds of a step: in all, and of compute, HBM and interconnect by themselves."""

  seconds: float
  compute_seconds: float
  hbm_seconds: float
  interconnect_seconds: float

  @property
  def bound(self) -> str:
    """The resource that takes longest: "compute", "hbm" or "interconnect"."""
    return max(("compute", "hbm", "interconnect"), key=lambda resource: getattr(self, f"{resource}_seconds"))


def collective_seconds(o: Operation, topology: Topology, mesh_sizes: Mapping[str, int]) -> float:
  """Seconds of all executions of a collective at full bandwidth; 0 for other operations.

  Args:
    mesh_sizes: {mesh axis: devices}, in the mesh's order.
  """
  if not o.collective_bytes:
    return 0.0
  axes, total_bytes = list(mesh_sizes), o.count * o.collective_bytes
  if axes[0] in o.axes and topology.num_slices > 1:  # the first axis crosses slices, see mesh.py
    return total_bytes / topology.chip.network_bandwidth
  group_size = math.prod(mesh_sizes[axis] for axis in o.axes)
  stride = math.prod(list(mesh_sizes.values())[axes.index(o.axes[-1]) + 1 :])
  return total_bytes / topology.collective_bandwidth(group_size, stride, o.kind.endswith("all-to-all"))


def matmul_seconds(o: Operation, chip: Chip, block: int) -> float:
  """Seconds of all executions of an operation's FLOPs at the chip's peak.

  FP8 GEMMs have a scale every `block` terms.
  """
  return o.count * o.flops / chip.peak_flops / (chip.fp8_speedup(block) if o.fp8 else 1)


def ideal_step_time(
  operations: Iterable[Operation], topology: Topology, mesh_sizes: Mapping[str, int], block: int
) -> StepTime:
  """Step time with every resource at its peak and full overlap. Arguments as in the functions above."""
  chip = topology.chip
  compute = sum(matmul_seconds(o, chip, block) for o in operations)
  hbm = sum(o.count * o.hbm_bytes for o in operations) / chip.hbm_bandwidth
  interconnect = sum(collective_seconds(o, topology, mesh_sizes) for o in operations)
  return StepTime(max(compute, hbm, interconnect), compute, hbm, interconnect)


def calibrated_step_time(
  operations: Iterable[Operation],
  topology: Topology,
  mesh_sizes: Mapping[str, int],
  block: int,
  efficiency: Efficiency = Efficiency(),
) -> StepTime:
  """Step time at `efficiency`. Each operation counts as compute or as HBM time, by the one that takes longer."""
  chip, compute, hbm = topology.chip, 0.0, 0.0
  for o in operations:
    o_compute, o_hbm = 0.0, o.count * o.hbm_bytes / chip.hbm_bandwidth / efficiency.hbm
    if o.flops:
      o_compute = matmul_seconds(o, chip, block) / efficiency.of_kind(o.kind)
    if o_compute > o_hbm:
      compute += o_compute
    else:
      hbm += o_hbm
  interconnect = sum(collective_seconds(o, topology, mesh_sizes) for o in operations) / efficiency.interconnect
  busy = compute + hbm
  exposed = max(interconnect * (1 - efficiency.overlap), interconnect - busy)
  return StepTime(busy + exposed, compute, hbm, interconnect)
