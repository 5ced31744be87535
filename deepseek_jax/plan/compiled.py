"""A step compiled for machines that are not here: what XLA makes of it for a TPU topology, its memory and its messages.

libtpu compiles without a TPU. Executables of such topologies cannot be read back from JAX's compilation cache, so what a plan
needs of one is kept instead, under the hash of the program and of the versions.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import sys
import tempfile
import time

import jax

from deepseek_jax.errors import ConfigError
from deepseek_jax.plan.topology import Topology

# About a sixth less time than by default, the same messages, memory within 1% (libtpu 0.0.50, V3's widths on 64 chips).
LEVEL = "O1"


def devices(topology: Topology):
  """The devices of a TPU topology. Raises ConfigError where libtpu does not know it."""
  from jax.experimental import topologies

  several = {"num_slices": topology.slices} if topology.slices > 1 else {}
  shape = "x".join(map(str, topology.shape))
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=f"{topology.name}:{shape}", **several).devices
  except Exception as error:
    reason = (str(error).strip().splitlines() or [""])[0]
    raise ConfigError(f"--topology={topology.text}: libtpu cannot make it: {reason[:200]}") from None
  if len(found) != topology.devices:
    raise ConfigError(f"--topology={topology.text}: libtpu finds {len(found)} devices in it, not {topology.devices}")
  return found


@dataclasses.dataclass(frozen=True)
class Compiled:
  """`lowered`: StableHLO; `hlo`: the optimized program; bytes on a device and in its host's memory, as XLA names them; `flops`
  as XLA's cost_analysis has them; `log`: what libtpu said; `seconds` it took to compile."""

  lowered: str
  hlo: str
  argument: int
  temporary: int
  output: int
  aliased: int
  host_argument: int
  host_aliased: int
  host_temporary: int
  flops: float
  log: str
  seconds: float

  @property
  def device(self):
    """Bytes on a device at the peak: donated arguments are their results."""
    return self.argument + self.output - self.aliased + self.temporary


def compiled(function, *arguments, **options) -> Compiled:
  """`function`, jitted with `options`, for the TPU mesh that is set; `arguments` are abstract, with shardings on it.

  Comes from the user's cache folder where the same program was compiled before by the same versions. Raises what XLA raises:
  jax.errors.JaxRuntimeError for a program that does not fit the chip's memory.
  """
  lowered = jax.jit(function, **options).trace(*arguments).lower(lowering_platforms=("tpu",))
  text, mesh = lowered.as_text(), jax.sharding.get_mesh()
  versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
  facts = json.dumps([LEVEL, versions, [f"{d} {d.device_kind}" for d in mesh.devices.flat], dict(mesh.shape)])
  key = hashlib.sha256(f"{facts}\n{text}".encode()).hexdigest()
  folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "deepseek_jax", "plans")
  path = folder / f"{key}.json"
  with contextlib.suppress(OSError, ValueError, TypeError):  # none yet, or cut short: it is compiled
    return Compiled(text, **json.loads(path.read_text()))
  print("compiling; libtpu that ends here without a word has failed on this mesh: try another one", file=sys.stderr)
  with _stderr() as log:
    started = time.monotonic()
    executable = _compile(lowered)
    seconds, said = time.monotonic() - started, log()
  m = executable.memory_analysis()
  found = Compiled(
    text, executable.as_text(), m.argument_size_in_bytes, m.temp_size_in_bytes, m.output_size_in_bytes,
    m.alias_size_in_bytes, m.host_argument_size_in_bytes, m.host_alias_size_in_bytes, m.host_temp_size_in_bytes,
    executable.cost_analysis().get("flops", 0.0), said, seconds,
  )  # fmt: skip
  with contextlib.suppress(OSError):  # without a place to keep it, it is compiled again
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({name: value for name, value in vars(found).items() if name != "lowered"}))
    os.replace(partial, path)
  return found


def _compile(lowered):
  usual = jax.config.jax_optimization_level
  jax.config.update("jax_optimization_level", LEVEL)
  try:
    return lowered.compile()
  finally:
    jax.config.update("jax_optimization_level", usual)


@contextlib.contextmanager
def _stderr():
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
