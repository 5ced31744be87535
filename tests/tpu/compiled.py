"""A program compiled for a TPU topology, and what its compilation tells: collectives, memory, warnings."""

import collections
import contextlib
import dataclasses
import os
import re
import sys
import tempfile

import jax
from jax.experimental import topologies

from deepseek_jax.config import MeshConfig
from deepseek_jax.mesh import make_mesh

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_HLO = re.compile(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_STABLEHLO = re.compile(r"stablehlo\.(all_gather|all_reduce|reduce_scatter|all_to_all|collective_permute)\"?\(")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f32": 4, "s32": 4, "u32": 4}


def pod(topology, slices=1, **sizes):
  """The mesh of `sizes` on chips that are not here, e.g. "v5p:4x4x4". Nothing can run on it, not even jax.random.key(0)."""
  several = {"num_slices": slices} if slices > 1 else {}
  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **several).devices
  return make_mesh(MeshConfig(**({"data": 1} | sizes)), devices)


@dataclasses.dataclass(frozen=True)
class Compiled:
  """`written`: collectives as the program says them; `hlo`: what XLA made of it; `log`: what libtpu said."""

  written: collections.Counter
  hlo: str
  memory: object
  flops: float
  log: str

  @property
  def collectives(self):
    """Collectives by name. A reduce-scatter that XLA writes as a fusion with an all-reduce in it counts as itself."""
    found = collections.Counter()
    for computation, line in self.lines():
      for name in _HLO.findall(line):
        found["reduce-scatter" if computation.startswith("%all-reduce-scatter") else name] += 1
    return found

  @property
  def between_slices(self):
    """[(name of the computation, bytes)] of what leaves the slice."""
    sends = [(name, re.search(r"= \((\w+)\[([\d,]*)\].* send\(", line)) for name, line in self.lines()]
    sends = [(name, match) for name, match in sends if match and "xla_megascale_runtime" in match.string]
    return [(name, _size(match[1], match[2])) for name, match in sends]

  def lines(self):
    """(computation, line) of each instruction; the program's own computation is "ENTRY"."""
    name = ""
    for line in self.hlo.splitlines():
      if line.endswith("{") and not line.startswith(" "):
        name = line.split(maxsplit=1)[0]
      yield name, line


def _size(dtype, shape):
  size = _BYTES[dtype]
  for length in filter(None, shape.split(",")):
    size *= int(length)
  return size


def compiled(function, *arguments, **options) -> Compiled:
  """`function`, jitted with `options`, for the TPU mesh that is set; `arguments` are abstract, with shardings on it."""
  lowered = jax.jit(function, **options).trace(*arguments).lower(lowering_platforms=("tpu",))
  with stderr() as log:
    executable = lowered.compile()
    said = log()
  text = lowered.as_text()
  written = collections.Counter(name.replace("_", "-") for name in _STABLEHLO.findall(text))
  written["ragged-all-to-all"] = text.count("custom_call @ragged_all_to_all")
  flops = executable.cost_analysis().get("flops", 0.0)
  return Compiled(written, executable.as_text(), executable.memory_analysis(), flops, said)


@contextlib.contextmanager
def stderr():
  """A function that returns what was written to file descriptor 2 so far: libtpu does not write to sys.stderr."""
  with tempfile.TemporaryFile() as file:
    sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)

    def text():
      file.seek(0)
      return file.read().decode(errors="replace")

    try:
      yield text
    finally:
      os.dup2(kept, 2)
      os.close(kept)
