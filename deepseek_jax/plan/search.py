"""Searches the fastest mesh, microbatch and remat policy of a config on a topology.

A best-first search over analytic plans changes one choice at a time. Then the best few plans are compiled.
"""

import dataclasses
import functools
import heapq
import math
from collections.abc import Callable, Iterator, Sequence

from deepseek_jax.config import Config
from deepseek_jax.config_sections import MeshConfig
from deepseek_jax.console import format_bytes
from deepseek_jax.errors import ConfigError
from deepseek_jax.mesh import AXES, resolve_mesh
from deepseek_jax.plan.memory import estimate_memory
from deepseek_jax.plan.plan import MakeStep, Plan, make_plan
from deepseek_jax.plan.topology import GIB, Topology

MAX_PLANS, NUM_COMPILED = 40, 3  # analytic plans of a search, and how many of the best are compiled
# The other two follow: data has one shard per slice, fsdp has the devices that remain.
SEARCHED_AXES = tuple(axis for axis in AXES if axis not in (AXES[0], AXES[2]))
REMAT = ("full", "none", "dots", "offload")
BUFFER_FACTORS = (2.0, 1.5)
# A candidate's estimated memory may be this much over the limit, since the estimate is off by up to 10%.
MEMORY_TOLERANCE = 1.1


@dataclasses.dataclass(frozen=True)
class Candidate:
  """What a search chooses: sizes of SEARCHED_AXES, and how a microbatch runs."""

  expert: int
  tensor: int
  stage: int
  context: int
  sequences_per_device: int  # of a microbatch
  remat: str
  buffer_factor: float  # of the expert buffer; 0 for the worst case

  def neighbors(self) -> Iterator["Candidate"]:
    """Candidates that differ in one respect."""
    replace, sequences = functools.partial(dataclasses.replace, self), self.sequences_per_device
    for n in (2 * sequences, sequences // 2):
      if n:
        yield replace(sequences_per_device=n)
    for axis in SEARCHED_AXES:
      size = getattr(self, axis)
      for new_size, scaled_sequences in ((2 * size, 2 * sequences), (size // 2, sequences // 2)):
        # The second keeps the size of the microbatch, where the axis does not shard it.
        for n in (sequences, scaled_sequences):
          if new_size and n:
            yield replace(**{axis: new_size, "sequences_per_device": n})
    for remat in REMAT:
      yield replace(remat=remat)
    if self.buffer_factor and self.expert > 1:
      for buffer_factor in BUFFER_FACTORS:
        yield replace(buffer_factor=buffer_factor)


def search(
  config: Config,
  topology: Topology,
  make_step: MakeStep,
  compile: bool = False,
  progress: Callable[[str], None] = print,
  max_plans: int = MAX_PLANS,
  max_candidates: float = math.inf,
) -> list[Plan]:
  """Plans for other meshes, microbatches, buffer factors and remat policies than the config's, fastest that fits first.

  Starts with the config's mesh and with one for each number of expert shards. Then it plans the neighbors of the best
  plan so far, until there are `max_plans` or no candidate is left. A candidate that does not fit by the estimate is not
  planned. Its neighbors are tried after those of the plans, least memory first.

  Args:
    make_step, compile: as in `make_plan`.
    progress: is called with a line per plan.
    max_candidates: after so many the search ends, also with fewer plans: few may fit, and there are many.

  Raises:
    ConfigError: no mesh fits.
  """
  tried: set[Candidate] = set()
  heap: list[tuple] = []
  least_bytes = math.inf  # on a device, of all candidates
  plans: list[Plan] = []
  queue = iter(initial_candidates(config, topology))
  while len(plans) < max_plans and len(tried) < max_candidates:
    for candidate in queue:
      candidate_config = None if candidate in tried else apply_candidate(candidate, config, topology)
      tried.add(candidate)
      if candidate_config is None:
        continue
      memory_bytes = estimate_memory(candidate_config, topology.chip).total_bytes
      least_bytes = min(least_bytes, memory_bytes)
      priority: tuple[bool, float] = (True, memory_bytes)
      if memory_bytes <= MEMORY_TOLERANCE * topology.chip.hbm_capacity and len(plans) < max_plans:
        progress(f"plan {len(plans) + 1} of at most {max_plans}: {describe_mesh(candidate_config)}")
        plans.append(make_plan(candidate_config, topology, make_step))
        priority = rank_key(plans[-1])
      heapq.heappush(heap, (*priority, len(tried), candidate))
    if not heap:
      break
    queue = heapq.heappop(heap)[-1].neighbors()
  if not plans:
    raise ConfigError(
      f"{config.name} fits on {topology.text} with no mesh that was tried: the best takes {format_bytes(least_bytes)} of "
      f"{format_bytes(topology.chip.hbm_capacity)} per device; take about {least_bytes / topology.chip.hbm_capacity:.1f} times "
      "as many devices or more, optimizer.offload=true, or a train.global_batch that more powers of two divide"
    )
  plans.sort(key=rank_key)
  return compile_best(plans, topology, make_step, progress) if compile else plans


def compile_best(
  plans: Sequence[Plan], topology: Topology, make_step: MakeStep, progress: Callable[[str], None]
) -> list[Plan]:
  """Compiles the first of `plans` until NUM_COMPILED fit, or until twice as many were tried.

  Returns all plans: those that fit first, compiled before analytic ones. Those that do not compile are left out.

  Raises:
    ConfigError: none compiles.
  """
  compiled: list[Plan] = []
  untried = list(plans)
  while untried and len(plans) - len(untried) < 2 * NUM_COMPILED and sum(p.fits for p in compiled) < NUM_COMPILED:
    plan = untried.pop(0)
    progress(f"compiling {describe_mesh(plan.config)}")
    try:
      compiled.append(make_plan(plan.config, topology, make_step, compile=True))
    except ConfigError as error:
      progress(f"left out: {error}")
  if not compiled:
    raise ConfigError(f"XLA cannot compile the best plans for {topology.text}: search with --analytic")
  return sorted(
    compiled + untried, key=lambda plan: (not plan.fits, plan.source == "analytic", plan.calibrated.seconds)
  )


def rank_key(plan: Plan) -> tuple[bool, float]:
  """Sort key: plans that fit first, then by step time."""
  return not plan.fits, plan.calibrated.seconds


def initial_candidates(config: Config, topology: Topology) -> list[Candidate]:
  """The config's own mesh, if it fits the topology, and one candidate for each number of expert shards."""
  moe, candidates = config.model.moe, []
  buffer_factor = moe.buffer_factor or BUFFER_FACTORS[0] * bool(moe.num_routed_experts)
  base = Candidate(1, 1, 1, 1, sequences_per_device=1, remat="full", buffer_factor=buffer_factor)
  try:
    config = resolve_mesh(config, topology.num_devices)
  except ConfigError:
    pass  # the config is for other topologies
  else:
    m, train = config.mesh, config.train
    batch_shards = topology.num_devices // (m.tensor * m.stage * m.context)
    sequences = max((train.microbatch or train.global_batch) // batch_shards, 1)
    candidates = [Candidate(m.expert, m.tensor, m.stage, m.context, sequences, config.model.remat, buffer_factor)]
  num_experts = moe.num_routed_experts
  expert_shards = [2**i for i in range(num_experts.bit_length()) if num_experts % 2**i == 0] or [1]  # dense: 1
  return candidates + [dataclasses.replace(base, expert=expert) for expert in expert_shards]


def apply_candidate(candidate: Candidate, config: Config, topology: Topology) -> Config | None:
  """`config` with a candidate's choices, or None where they do not divide the devices, the batch or the model."""
  train, moe = config.train, config.model.moe
  unsharded_batch = candidate.tensor * candidate.stage * candidate.context  # axes that do not shard the batch
  microbatch = topology.num_devices // unsharded_batch * candidate.sequences_per_device
  fsdp, remainder = divmod(topology.num_devices, unsharded_batch * candidate.expert * topology.num_slices)
  if remainder or not fsdp or (candidate.expert > 1 and not moe.num_routed_experts):
    return None
  if train.global_batch % microbatch or (train.batch_ramp_from or microbatch) % microbatch:
    return None
  mesh = MeshConfig(data=topology.num_slices, fsdp=fsdp, **{axis: getattr(candidate, axis) for axis in SEARCHED_AXES})
  if candidate.expert > 1:
    moe = dataclasses.replace(moe, buffer_factor=candidate.buffer_factor)
  model = dataclasses.replace(config.model, remat=candidate.remat, moe=moe)
  train = dataclasses.replace(train, microbatch=microbatch)
  try:
    return resolve_mesh(dataclasses.replace(config, model=model, mesh=mesh, train=train), topology.num_devices)
  except ConfigError:
    return None


def describe_mesh(config: Config) -> str:
  """Mesh, microbatch and remat policy in one phrase."""
  mesh = " ".join(f"{axis}={getattr(config.mesh, axis)}" for axis in AXES if getattr(config.mesh, axis) > 1)
  buffer = f", buffer factor {config.model.moe.buffer_factor:g}" if config.mesh.expert > 1 else ""
  return f"{mesh or 'one device'}, microbatch {config.train.microbatch}, remat {config.model.remat}{buffer}"


def format_ranking(plans: Sequence[Plan]) -> str:
  """A table of plans in their order."""
  lines = ["  step s    MFU  GiB  fits  bound         source    mesh"]
  for plan in plans:
    time = plan.calibrated
    lines.append(
      f"{time.seconds:8.2f}  {plan.mfu(time):5.1%} {gib if (gib := round(plan.memory_bytes / GIB)) >= 10 else f'{plan.memory_bytes / GIB:.2g}':>4}  {'yes ' if plan.fits else 'NO  '}  "
      f"{time.bound:12}  {plan.source:8}  {describe_mesh(plan.config)}"
    )
  return "\n".join(lines)
