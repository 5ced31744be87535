"""Machines that need not be here: what a chip can do, and how many of them are joined by which network.

Rates of chips are from the vendors' data sheets and Google's TPU pages, one way where a link has two; of GPUs across nodes,
one 400 Gbit/s network card a GPU.
"""

import dataclasses
import importlib.util
import math
import re

from deepseek_jax.errors import ConfigError

GIB = 2**30

# To be set before jax is imported, so that libtpu compiles where there is no TPU.
COMPILER_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
  "TPU_WORKER_HOSTNAMES": "localhost",  # or it says an error
  "TPU_ACCELERATOR_TYPE": "v5p-8",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # by several processes
  "TPU_STDERR_LOG_LEVEL": "1",  # its warnings go to a file otherwise
  # What is compiled without a TPU can be written to JAX's cache and not be read back: each hit is a warning and a compile.
  "JAX_ENABLE_COMPILATION_CACHE": "false",
}


def can_compile() -> bool:
  """Whether libtpu is installed."""
  return importlib.util.find_spec("libtpu") is not None


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device as jax counts them. `link`: bytes/s one way of a link in a TPU torus, or of NVLink; `network`: of a device's
  share of the data-centre network. `torus`: dimensions of the torus; 0 for GPUs, of which `node` share NVLink.

  fp8: rate of FP8 GEMMs beside bfloat16's, with scales every 128, 256 and 512 terms. Of TPUs by the
  length of the kernels' steps (tests/kernels/bundles.json; v5e is taken for a v5p), of Hopper what DeepGEMM reaches
  (1410e12 on an H800) beside bfloat16 (788e12 on an H200); no kernel of ours was timed. Elsewhere XLA
  multiplies bfloat16; bytes are counted as for kernels all the same.
  """

  kind: str
  flops: float  # dense bfloat16, FLOP/s
  hbm: float  # bytes that a program can have
  bandwidth: float  # of HBM, bytes/s
  link: float
  network: float
  torus: int = 0
  node: int = 8
  devices: int = 1  # of a package that the topology counts
  fp8: tuple[float, float, float] = (1.0, 1.0, 1.0)

  def fp8_speedup(self, block):
    return dict(zip((128, 256, 512), self.fp8, strict=True))[block]


CHIPS = {
  "v4": Chip("TPU v4", 275e12, 31.75 * GIB, 1.23e12, 45e9, 6.25e9, torus=3),
  "v5e": Chip("TPU v5 lite", 197e12, 15.75 * GIB, 0.82e12, 45e9, 3.1e9, torus=2, fp8=(0.93, 0.94, 1.05)),
  "v5p": Chip("TPU v5p", 459e12, 95.74 * GIB, 2.77e12, 90e9, 6.25e9, torus=3, fp8=(0.93, 0.94, 1.05)),
  "v6e": Chip("TPU v6e", 918e12, 31.25 * GIB, 1.64e12, 90e9, 12.5e9, torus=2, fp8=(0.61, 0.99, 1.08)),
  "tpu7x": Chip("TPU7x", 1153.5e12, 94.75 * GIB, 3.69e12, 90e9, 12.5e9, torus=3, devices=2, fp8=(0.47, 0.79, 1.0)),
  "a100": Chip("A100", 312e12, 79 * GIB, 2.04e12, 300e9, 25e9),
  "h100": Chip("H100", 989e12, 79 * GIB, 3.35e12, 450e9, 50e9, fp8=(1.79, 1.0, 1.0)),
  "h800": Chip("H800", 989e12, 79 * GIB, 3.35e12, 200e9, 50e9, fp8=(1.79, 1.0, 1.0)),
  "h200": Chip("H200", 989e12, 140 * GIB, 4.8e12, 450e9, 50e9, fp8=(1.79, 1.0, 1.0)),
  "b200": Chip("B200", 2250e12, 178 * GIB, 8e12, 900e9, 50e9),
}
_FORM = re.compile(r"(?:(\d+)\*)?([a-z]\w*)(?::(\d+(?:x\d+)*))?")


@dataclasses.dataclass(frozen=True)
class Topology:
  """`slices` equal slices of `shape` packages of `chip`; of GPUs, `shape` is (nodes, GPUs of a node) and there is one slice."""

  text: str
  name: str
  chip: Chip
  slices: int
  shape: tuple[int, ...]

  @property
  def devices(self) -> int:
    return self.slices * math.prod(self.shape) * self.chip.devices

  @property
  def is_tpu(self) -> bool:
    return self.chip.torus > 0

  def bandwidth(self, size, stride, to_all=False):
    """Bytes/s that a device sends in a collective of `size` devices that are `stride` apart, within a slice.

    `to_all`: each device has something else for each other one, which on a torus passes a quarter of a ring on the way, and
    between nodes takes a GPU's own card.

    On a torus the group has two links of each dimension that it spans, or one where it does not go all the way round. GPUs of
    a node have NVLink; between nodes the network cards of those of a node that are in the group share the work.
    """
    if not self.is_tpu:
      of_node = max(min(size, self.shape[-1] // stride), 1)
      if of_node >= size:
        return self.chip.link
      return self.chip.network if to_all else min(self.chip.link, of_node * self.chip.network)
    left, links, hops = size, 0, 1.0
    for side in sorted(self.shape, reverse=True):
      if left > 1:
        links += 2 if left >= side > 2 else 1
        hops = max(hops, min(left, side) / 4)
        left = -(-left // side)
    return links * self.chip.link / self.chip.devices / (hops if to_all else 1)


def parse(text) -> Topology:
  """`v5p:8x8x8` (chips), `2*v5p:8x8x8` (slices), `h100:64x8` (nodes x GPUs), `h200` (one). Raises ConfigError otherwise."""
  match = _FORM.fullmatch(text.lower())
  if not match or match[2] not in CHIPS:
    raise ConfigError(
      f"--topology={text}: write KIND:SHAPE, such as v5p:8x8x8, 2*v5p:8x8x8 (slices) or h100:64x8 (nodes x GPUs), with one "
      f"of the kinds {', '.join(CHIPS)}"
    )
  slices, name, chip = int(match[1] or 1), match[2], CHIPS[match[2]]
  shape = tuple(map(int, match[3].split("x"))) if match[3] else (1,) * max(chip.torus, 1)
  if chip.torus and match[3] and len(shape) != chip.torus:
    raise ConfigError(
      f"--topology={text}: {name} chips are joined in {chip.torus} dimensions, such as {name}:{'x'.join(['4'] * chip.torus)}"
    )
  if not chip.torus and (slices > 1 or len(shape) > 2 or shape[-1] > chip.node):
    raise ConfigError(
      f"--topology={text}: write nodes x GPUs of a node, at most {chip.node}, such as {name}:64x{chip.node}, or {name} for one"
    )
  if 0 in (slices, *shape):
    raise ConfigError(f"--topology={text}: sizes are 1 or more")
  return Topology(text, name, chip, slices, shape)


def peak_flops(device_kind: str) -> float | None:
  """bfloat16 peak of a device in FLOP/s by its `device_kind`, or None where it is not known (CPUs)."""
  kind = {"TPU v5": "TPU v5p", "TPU v5e": "TPU v5 lite", "TPU v6 lite": "TPU v6e"}.get(device_kind, device_kind)
  return next((chip.flops for chip in CHIPS.values() if chip.kind in kind), None)
