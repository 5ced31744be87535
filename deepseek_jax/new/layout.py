"""How a config runs on its hardware: mesh, microbatch and remat policy, the memory that takes, and the time of a step."""

import dataclasses
import itertools
import math

from deepseek_jax.config import Config
from deepseek_jax.config_sections import MeshConfig
from deepseek_jax.errors import ConfigError
from deepseek_jax.mesh import resolve_mesh
from deepseek_jax.new.hardware import Hardware
from deepseek_jax.plan.flops import training_flops
from deepseek_jax.plan.memory import estimate_memory
from deepseek_jax.plan.plan import Plan, make_plan, with_xla_attention
from deepseek_jax.plan.search import BUFFER_FACTORS, rank_key, search
from deepseek_jax.training.step import abstract_step

MAX_PLANS = (
  4  # of a search, whose first ones are the best or nearly so; each takes a second or, of a mixture of experts, three
)


@dataclasses.dataclass(frozen=True)
class Layout:
  """A config with its layout.

  Attributes:
    config: its mesh is resolved.
    memory: bytes on a device, of `hardware.memory`.
    seconds: of a step; 0: not known.
  """

  config: Config
  memory: float
  seconds: float


def find_layout(
  config: Config, hardware: Hardware, flops_per_second: float, max_plans: int = MAX_PLANS
) -> Layout | None:
  """The fastest layout that was found; None where none fits.

  Args:
    flops_per_second: of a step, where there is no topology to plan for.
    max_plans: of the search for a topology; None: MAX_PLANS.
  """
  if hardware.topology is None:
    return _without_topology(config, hardware, flops_per_second)
  plans: list[Plan] = []
  for start in _starts(config, hardware):
    try:
      plans += search(start, hardware.topology, abstract_step, False, lambda line: None, max_plans or MAX_PLANS)
      break
    except ConfigError:  # nothing fits that can be reached from this mesh
      continue
  if not plans:
    replicated = _partly_sharded(config, hardware)
    plans = [make_plan(replicated, hardware.topology, abstract_step)] if replicated else []
  best = min((plan for plan in plans if plan.fits), key=rank_key, default=None)
  return Layout(best.config, best.memory_bytes, best.calibrated.seconds) if best else None


def fits_quickly(config: Config, hardware: Hardware) -> bool:
  """Whether a step fits on a mesh from which a search would start: without the search, which takes seconds."""
  if hardware.topology is None:
    return _without_topology(config, hardware, 1.0) is not None
  replicated = _partly_sharded(config, hardware)
  return replicated is not None or any(fits(start, hardware) for start in _starts(config, hardware))


def _starts(config: Config, hardware: Hardware) -> list[Config]:
  """Meshes to search from."""
  found = (_all_sharded(config, hardware, shards_experts) for shards_experts in (True, False))
  return list(dict.fromkeys(start for start in found if start))


def _all_sharded(config: Config, hardware: Hardware, shards_experts: bool) -> Config | None:
  """`config` on a mesh whose every device in a slice has a shard of the weights; None where that does not divide them."""
  in_slice = hardware.num_devices // hardware.num_slices
  experts = config.model.moe.num_routed_experts
  expert = math.gcd(experts, in_slice) if experts and shards_experts else 1
  for tensor in (1, 2, 4, 8):
    mesh = MeshConfig(data=hardware.num_slices, fsdp=-1, expert=expert, tensor=tensor)
    microbatch = hardware.num_devices // tensor
    if in_slice % (expert * tensor) == 0 and config.train.global_batch % microbatch == 0:
      # As a search has it: without a limit, the buffer of an expert has room for every token.
      moe = dataclasses.replace(config.model.moe, buffer_factor=BUFFER_FACTORS[0] if expert > 1 else 0.0)
      limited = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
      try:
        return resolve_mesh(with_mesh(limited, mesh, microbatch), hardware.num_devices)
      except ConfigError:  # these sizes do not divide the model
        continue
  return None


def _partly_sharded(config: Config, hardware: Hardware) -> Config | None:
  """`config` with weights sharded over as many devices as divide them, and replicated over the others."""
  in_slice = hardware.num_devices // hardware.num_slices
  for fsdp in (n for n in range(in_slice, 0, -1) if in_slice % n == 0):
    try:
      mesh = MeshConfig(data=-1, fsdp=fsdp)
      resolved = resolve_mesh(with_mesh(config, mesh, hardware.num_devices), hardware.num_devices)
    except ConfigError:  # so many do not divide the model
      continue
    return resolved if fits(resolved, hardware) else None
  return None


def with_mesh(config: Config, mesh: MeshConfig, microbatch: int) -> Config:
  """`config` with another mesh and microbatch. Raises ConfigError where they do not fit it."""
  return dataclasses.replace(config, mesh=mesh, train=dataclasses.replace(config.train, microbatch=microbatch))


def fits(config: Config, hardware: Hardware) -> bool:
  """Whether a step of a config, whose mesh is resolved, fits the devices by the estimate; so where nothing is known."""
  return not hardware.memory or memory_bytes(config, hardware) <= hardware.memory


def memory_bytes(config: Config, hardware: Hardware) -> float:
  """Bytes on a device of a step of a config, whose mesh is resolved."""
  if hardware.topology:
    return estimate_memory(config, hardware.topology.chip).total_bytes
  return estimate_memory(with_xla_attention(config)).total_bytes


def _without_topology(config: Config, hardware: Hardware, flops_per_second: float) -> Layout | None:
  """Data parallelism on CPUs and FSDP on others, with the largest microbatch and the least remat that fit."""
  meshes = (MeshConfig(),) if hardware.is_cpu else (MeshConfig(data=1, fsdp=-1), MeshConfig())
  batch, devices = config.train.global_batch, hardware.num_devices
  # Measured on 2 CPU cores: a dense model is faster with full remat than with what is kept written and read again.
  remats = ("none", "full") if config.model.moe.num_routed_experts else ("full",)
  for microbatches in (n for n in range(1, batch // devices + 1) if batch % n == 0 and batch // n % devices == 0):
    microbatch = batch // microbatches if microbatches > 1 else 0  # 0 is the whole batch
    for remat, mesh in itertools.product(remats, meshes):
      changed = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
      try:
        resolved = resolve_mesh(with_mesh(changed, mesh, microbatch), devices)
      except ConfigError:  # FSDP over so many devices does not divide the model
        continue
      if fits(resolved, hardware):
        flops = training_flops(config.model, config.data.seq).causal * batch * config.data.seq
        return Layout(resolved, memory_bytes(resolved, hardware), flops / flops_per_second)
  return None
