"""A program compiled for a TPU topology, and what its compilation tells: collectives, memory, warnings."""

import collections
import contextlib
import dataclasses
import math
import os
import re
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from deepseek_jax.config import MeshConfig
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.transformer import graphdef
from deepseek_jax.sharding import spec
from deepseek_jax.training.state import abstract_state
from deepseek_jax.training.step import make_train_step

REMATERIALIZED = "nvoluntary full rematerialization"
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_HLO = re.compile(rf"= (.*) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_STABLEHLO = re.compile(r"stablehlo\.(all_gather|all_reduce|reduce_scatter|all_to_all|collective_permute)\"?\(")
_SHAPE = re.compile(r"(pred|[suf]\d+|bf16)\[([\d,]*)\]")


def pod(topology, slices=1, **sizes):
  """The mesh of `sizes` on chips that are not here, e.g. "v5p:4x4x4". Nothing can run on it, not even jax.random.key(0)."""
  several = {"num_slices": slices} if slices > 1 else {}
  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **several).devices
  return make_mesh(MeshConfig(**({"data": 1} | sizes)), devices)


@dataclasses.dataclass(frozen=True)
class Collective:
  """`size`: bytes on a device of the largest array that it makes; `looped`: in a loop over microbatches or layers."""

  kind: str
  size: int
  looped: bool


@dataclasses.dataclass(frozen=True)
class Compiled:
  """`written`: collectives as the program says them; `hlo`: what XLA made of it; `log`: what libtpu said; `seconds` it took."""

  written: collections.Counter
  hlo: str
  memory: object
  flops: float
  log: str
  seconds: float

  @property
  def collectives(self) -> list[Collective]:
    """A reduce-scatter that XLA writes as a fusion with an all-reduce in it counts as itself."""
    found = []
    for computation, line in self.lines():
      if match := _HLO.search(line):
        kind = "reduce-scatter" if computation.startswith("%all-reduce-scatter") else match[2]
        size = max(_size(*shape) for shape in _SHAPE.findall(match[1]))
        found.append(Collective(kind, size, "while/body" in line))
    return found

  @property
  def counts(self):
    """How often each kind of collective stands in the program; a loop's body stands once."""
    return collections.Counter(c.kind for c in self.collectives)

  @property
  def between_slices(self):
    """[(name of the computation, bytes)] of what leaves the slice."""
    sends = [(name, re.search(r"= (.*) send\(", line)) for name, line in self.lines()]
    sends = [(name, match) for name, match in sends if match and "xla_megascale_runtime" in match.string]
    return [(name, _size(*_SHAPE.search(match[1]).groups())) for name, match in sends]

  @property
  def device_bytes(self):
    """What the program holds on a device at its peak: donated arguments are their results."""
    m = self.memory
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes

  def lines(self):
    """(computation, line) of each instruction, as scheduled; the program's own computation is "ENTRY"."""
    name = ""
    for line in self.hlo.splitlines():
      if line.endswith("{") and not line.startswith(" "):
        name = line.split(maxsplit=1)[0]
      yield name, line


def _size(dtype, shape):
  return math.prod(map(int, filter(None, shape.split(",")))) * max(int(re.sub(r"\D", "", dtype) or 8) // 8, 1)


def compiled(function, *arguments, **options) -> Compiled:
  """`function`, jitted with `options`, for the TPU mesh that is set; `arguments` are abstract, with shardings on it."""
  lowered = jax.jit(function, **options).trace(*arguments).lower(lowering_platforms=("tpu",))
  with stderr() as log:
    started = time.monotonic()
    executable = lowered.compile()
    seconds, said = time.monotonic() - started, log()
  text = lowered.as_text()
  written = collections.Counter(name.replace("_", "-") for name in _STABLEHLO.findall(text))
  written["ragged-all-to-all"] = text.count("custom_call @ragged_all_to_all")
  flops = executable.cost_analysis().get("flops", 0.0)
  return Compiled(written, executable.as_text(), executable.memory_analysis(), flops, said, seconds)


def compiled_step(config, mesh):
  """(the update of `config` compiled for `mesh`, abstract state)."""
  with jax.set_mesh(mesh):
    state, microbatches = abstract_state(config, mesh), config.train.global_batch // config.train.microbatch
    shape = microbatches, config.train.microbatch, config.data.seq + 1
    batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, spec(None, "batch", None)))
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, jax.P()))
    update = make_train_step(config, graphdef(config.model), bos=0)

    def step(state, batch, rates):
      return update(state, batch, microbatches, rates)

    rates = dict.fromkeys(("learning_rate", "mtp_weight", "bias_speed"), rate)
    return compiled(step, state, batch, rates, donate_argnums=0), state


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
