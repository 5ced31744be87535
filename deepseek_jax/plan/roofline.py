"""How long a step takes at least, and about how long it will take: operations over what a chip and its networks can do.

Ideal: products, memory and network each at their peak, all three at once; the slowest is the bound. Calibrated: one operation
after the other, each at a share of the peak, and what of the network's time is not hidden behind them.
"""

import dataclasses
import math

from deepseek_jax.plan.count import Operation
from deepseek_jax.plan.topology import Chip, Topology


@dataclasses.dataclass(frozen=True)
class Efficiency:
  """Shares of the peaks that a step reaches, and `hidden`, of the network's time what computation covers.

  Large bfloat16 products reach about 80% of the peak on TPUs and on Hopper, long copies about as much of the bandwidth.
  Grouped products and fused attention are known for about half. No number here was measured by us: what speaks for them is
  that they give the MFU that maxtext publishes for V3 on 512 v5p chips within a tenth (tests/plan/test_plan.py).
  """

  product: float = 0.8
  grouped_product: float = 0.5
  fused_attention: float = 0.5
  memory: float = 0.8
  network: float = 0.8
  hidden: float = 0.6


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds of a step: in all, and of its parts alone; `bound` is the largest part."""

  seconds: float
  compute: float
  hbm: float
  interconnect: float

  @property
  def bound(self):
    return max(("compute", "hbm", "interconnect"), key=lambda part: getattr(self, part))


def message_seconds(o: Operation, topology: Topology, sizes) -> float:
  """Seconds of all messages of an operation at full bandwidth; `sizes`: {mesh axis: devices}, in the mesh's order."""
  if not o.sent:
    return 0.0
  names = list(sizes)
  n, stride = math.prod(sizes[axis] for axis in o.axes), math.prod(list(sizes.values())[names.index(o.axes[-1]) + 1 :])
  if names[0] in o.axes and topology.slices > 1:  # the first axis crosses slices, see mesh.py
    return o.times * o.sent / topology.chip.network
  return o.times * o.sent / topology.bandwidth(n, stride, to_all=o.kind.endswith("all-to-all"))


def product_seconds(o: Operation, chip: Chip, block) -> float:
  """Seconds of all products of an operation at their peak; FP8 GEMMs have a scale every `block` terms."""
  return o.times * o.flops / chip.flops / (chip.fp8_speedup(block) if o.fp8 else 1)


def ideal(operations, topology: Topology, sizes, block) -> Estimate:
  chip = topology.chip
  compute = sum(product_seconds(o, chip, block) for o in operations)
  hbm = sum(o.times * o.bytes for o in operations) / chip.bandwidth
  network = sum(message_seconds(o, topology, sizes) for o in operations)
  return Estimate(max(compute, hbm, network), compute, hbm, network)


def calibrated(operations, topology: Topology, sizes, block, efficiency=Efficiency()) -> Estimate:
  """Each operation is charged to what bounds it: its product or its memory."""
  chip, parts = topology.chip, {"compute": 0.0, "hbm": 0.0}
  for o in operations:
    product = product_seconds(o, chip, block) / getattr(efficiency, o.kind.replace(" ", "_"), 1) if o.flops else 0
    memory = o.times * o.bytes / chip.bandwidth / efficiency.memory
    parts["compute" if product > memory else "hbm"] += max(product, memory)
  network = sum(message_seconds(o, topology, sizes) for o in operations) / efficiency.network
  work = sum(parts.values())
  shown = max(network * (1 - efficiency.hidden), network - work)
  return Estimate(work + shown, **parts, interconnect=network)
