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
import re
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
    raise ConfigError(
      f"--topology={topology.text}: libtpu finds {len(found)} devices in it, not {topology.devices}: plan with --analytic"
    )
  return found


@dataclasses.dataclass(frozen=True)
class Compiled:
  """`lowered`: StableHLO; `hlo`: the optimized program; bytes on a device and in its host's memory, as XLA names them; `flops`
  as XLA's cost_analysis has them; `log`: what libtpu said; `seconds` of CPU time that it took."""

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


class OutOfMemory(Exception):
  """A program that does not fit the chip's memory. `args`: the bytes that XLA says it needs, at least one more than there are."""


def compiled(function, *arguments, log=None, **options) -> Compiled:
  """`function`, jitted with `options`, for the TPU mesh that is set; `arguments` are abstract, with shardings on it.

  Comes from the user's cache folder where the same program was compiled before by the same versions, under the same flags of
  XLA. What libtpu says goes to the file `log`, if one is named: where it ends the process, that is all there is to read.
  Raises OutOfMemory, and for what XLA cannot compile jax.errors.JaxRuntimeError.
  """
  lowered = jax.jit(function, **options).trace(*arguments).lower(lowering_platforms=("tpu",))
  text = lowered.as_text()
  path = _place(text, jax.sharding.get_mesh())
  try:
    found = json.loads(path.read_text())
  except (OSError, ValueError):  # none yet, or cut short
    found = _facts(lowered, log)
    _keep(path, json.dumps(found))
  if "needed" in found:
    raise OutOfMemory(found["needed"])
  return Compiled(text, **found)


def _place(text, mesh):
  """Where what is known of a program is kept."""
  versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")]
  said = [os.environ.get(name) for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")]
  fields = [field.name for field in dataclasses.fields(Compiled)]
  about = json.dumps(
    [LEVEL, versions, said, fields, [f"{d} {d.device_kind}" for d in mesh.devices.flat], dict(mesh.shape)]
  )
  folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "deepseek_jax", "plans")
  return folder / f"{hashlib.sha256(about.encode() + text.encode()).hexdigest()}.json"


def _keep(path, text):
  with contextlib.suppress(OSError):  # without a place to keep it, it is compiled again
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, path)


def _facts(lowered, log) -> dict:
  """The fields of Compiled but for `lowered`, or {"needed": bytes} where that is more than there is."""
  usual, started = jax.config.jax_optimization_level, time.process_time()
  jax.config.update("jax_optimization_level", LEVEL)
  try:
    with _stderr(log) as said:
      executable = lowered.compile()
      text = said()
  except jax.errors.JaxRuntimeError as error:
    if not (needed := out_of_memory(str(error))):
      raise
    return {"needed": needed}
  finally:
    jax.config.update("jax_optimization_level", usual)
  m = executable.memory_analysis()
  return {
    "hlo": executable.as_text(), "argument": m.argument_size_in_bytes, "temporary": m.temp_size_in_bytes,
    "output": m.output_size_in_bytes, "aliased": m.alias_size_in_bytes, "host_argument": m.host_argument_size_in_bytes,
    "host_aliased": m.host_alias_size_in_bytes, "host_temporary": m.host_temp_size_in_bytes,
    "flops": executable.cost_analysis().get("flops", 0.0), "log": text, "seconds": time.process_time() - started,
  }  # fmt: skip


def out_of_memory(message) -> int | None:
  """Bytes that a program needs, at least one more than there are, of XLA's error; None where it is about something else."""
  # "Used 99.9G of 95.7G hbm", which may read "95.7G of 95.7G"; of temporaries alone "(204.5G) exceeds available HBM (95.7G)".
  size = r"\(?([\d.]+)([KMGT])\)?"
  used = re.search(rf"(?:Used|temporaries) {size} (?:of|exceeds available HBM) {size}", message)
  if not used:
    return None
  needed, limit = (int(float(used[i]) * 1024 ** (1 + "KMGT".index(used[i + 1]))) for i in (1, 3))
  return max(needed, limit + 1)


@contextlib.contextmanager
def _stderr(path):
  """A function that returns what was written to file descriptor 2 so far: libtpu does not write to sys.stderr. It goes to the
  file at `path`, or to one without a name."""
  with open(path, "w+b") if path else tempfile.TemporaryFile() as file:
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
