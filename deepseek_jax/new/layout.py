"""How a config runs on its hardware: mesh, microbatch and remat policy, the memory that takes, and the time of a step."""

import dataclasses
import itertools
import math

from deepseek_jax.config import Config
from deepseek_jax.config_sections import MeshConfig
from deepseek_jax.errors import ConfigError
from deepseek_jax.mesh import resolve_mesh
from deepseek_jax.new.hardware import Hardware, step_fraction
from deepseek_jax.plan.flops import training_flops
from deepseek_jax.plan.memory import estimate_memory, with_xla_attention
from deepseek_jax.plan.plan import Plan, make_plan
from deepseek_jax.plan.search import BUFFER_FACTORS, rank_key, search
from deepseek_jax.training.step import abstract_step

MAX_PLANS = (
  4  # of a search, whose first ones are the best or nearly so; each takes a second or, of a mixture of experts, three
)

MAX_CANDIDATES = 60  # of a search, most of which may not fit
LONG_SEQ = 8192  # of longer sequences, one may be too much for a device


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
  config: Config, hardware: Hardware, flops_per_second: float, max_plans: int | None = None
) -> Layout | None:
  """The fastest layout that was found; None where none fits.

  Args:
    flops_per_second: of a large matrix product, where there is no topology to plan for.
    max_plans: of the search for a topology; None: MAX_PLANS.
  """
  if hardware.topology is None:
    return _without_topology(config, hardware, flops_per_second)
  start = _start(config, hardware)
  if start is None:
    return None
  plans: list[Plan] = []
  try:
    plans = search(
      start, hardware.topology, abstract_step, False, lambda line: None, max_plans or MAX_PLANS, MAX_CANDIDATES
    )
  except ConfigError:  # a search has no replicas in a slice
    plans = [make_plan(start, hardware.topology, abstract_step)]
  best = min((plan for plan in plans if plan.fits), key=rank_key, default=None)
  return Layout(best.config, best.memory_bytes, best.calibrated.seconds) if best else None


def fits_somehow(config: Config, hardware: Hardware) -> bool:
  """Whether a step fits on a mesh from which a search would start: without the search, which takes seconds."""
  if hardware.topology is None:
    return _without_topology(config, hardware, 1.0) is not None
  return _start(config, hardware) is not None


def _start(config: Config, hardware: Hardware) -> Config | None:
  """`config` on the first mesh on which it fits: with few axes, and with every device in a slice having its own shard."""
  in_slice = hardware.num_devices // hardware.num_slices
  experts = config.model.moe.num_routed_experts
  contexts = (1,) if config.data.seq <= LONG_SEQ else (1, 4, 16)
  for expert, context, tensor in itertools.product(
    dict.fromkeys((math.gcd(experts, in_slice), 1) if experts else (1,)), contexts, (1, 2, 4, 8)
  ):
    # As a search has it: without a limit, the buffer of an expert has room for every token.
    moe = dataclasses.replace(config.model.moe, buffer_factor=BUFFER_FACTORS[0] if expert > 1 else 0.0)
    limited = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    mesh = MeshConfig(data=hardware.num_slices, fsdp=-1, expert=expert, context=context, tensor=tensor)
    found = _fitting(limited, mesh, hardware.num_devices // (tensor * context), hardware)
    if found:
      return found
  # Otherwise as many shards as divide the weights, and replicas of them.
  divisors = (n for n in range(in_slice, 0, -1) if in_slice % n == 0)
  replicated = (_fitting(config, MeshConfig(fsdp=n), hardware.num_devices, hardware) for n in divisors)
  return next((found for found in replicated if found), None)


def _fitting(config: Config, mesh: MeshConfig, microbatch: int, hardware: Hardware) -> Config | None:
  """`config` on a mesh, resolved; None where the mesh does not divide it, or a step does not fit."""
  try:
    resolved = resolve_mesh(with_mesh(config, mesh, microbatch), hardware.num_devices)
  except ConfigError:
    return None
  return resolved if fits(resolved, hardware) else None


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
      resolved = _fitting(changed, mesh, microbatch, hardware)
      if resolved:
        flops = training_flops(config.model, config.data.seq).causal * batch * config.data.seq
        return Layout(
          resolved, memory_bytes(resolved, hardware), flops / (flops_per_second * step_fraction(config.model.embed))
        )
  return None
