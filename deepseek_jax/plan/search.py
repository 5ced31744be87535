"""The best mesh for a config on a topology: the best found is changed in one respect at a time, without a compiler; then the
best few are compiled."""

import dataclasses
import functools
import heapq

from deepseek_jax.config import Config, MeshConfig
from deepseek_jax.errors import ConfigError
from deepseek_jax.mesh import AXES, resolve_mesh
from deepseek_jax.plan.memory import estimate_memory
from deepseek_jax.plan.plan import Plan, make_plan
from deepseek_jax.plan.topology import GIB, Topology

PLANNED, COMPILED = 40, 3  # how many are planned, and of the best how many are compiled
TRIED = tuple(
  axis for axis in AXES if axis not in (AXES[0], AXES[2])
)  # data has the slices, fsdp the devices that are left
REMAT = ("full", "none", "dots", "offload")
BUFFERS = (2.0, 1.5)  # even loads
SLACK = 1.1  # estimated memory of a candidate may be that much over the limit: the estimate is no better


@dataclasses.dataclass(frozen=True)
class Choice:
  """What is tried: sizes of TRIED, sequences of a microbatch on a device, remat, room for what a device receives."""

  expert: int
  tensor: int
  stage: int
  context: int
  rows: int
  remat: str
  buffer: float

  def neighbours(self):
    changed = functools.partial(dataclasses.replace, self)
    yield from (changed(rows=rows) for rows in (2 * self.rows, self.rows // 2) if rows)
    for axis in TRIED:
      now = getattr(self, axis)
      for size, rows in ((2 * now, 2 * self.rows), (now // 2, self.rows // 2)):
        # Also with as many sequences in a microbatch as before, where the axis does not share them out.
        yield from (changed(**{axis: size, "rows": n}) for n in (self.rows, rows) if size and n)
    yield from (changed(remat=remat) for remat in REMAT)
    yield from (changed(buffer=buffer) for buffer in BUFFERS if self.buffer and self.expert > 1)


def search(config: Config, topology: Topology, program, compile=False, progress=print, most=PLANNED) -> list[Plan]:
  """Plans of other meshes, microbatches, buffer factors and remat policies than `config` has, the fastest that fits first.

  Begins with the mesh of the config and with one for every number of expert shards, and changes the best of what it knows
  in one respect, until `most` are planned or none is left. What does not fit is not planned, only changed: that of the
  least memory first.

  Raises ConfigError where no mesh works at all. Arguments as in `make_plan`; `progress` is told what happens.
  """
  seen, heap, plans = set(), [], []
  waiting = starts(config, topology)
  while len(plans) < most:
    for choice in waiting:
      candidate = None if choice in seen else applied(choice, config, topology)
      seen.add(choice)
      if candidate is None:
        continue
      worth = (True, estimate_memory(candidate, topology.chip).total)
      if worth[1] <= SLACK * topology.chip.hbm and len(plans) < most:
        progress(f"{len(plans) + 1} of at most {most}: {named(candidate)}")
        plans.append(make_plan(candidate, topology, program))
        worth = rank(plans[-1])
      heapq.heappush(heap, (*worth, len(seen), choice))
    if not heap:
      break
    waiting = heapq.heappop(heap)[-1].neighbours()
  if not plans:
    raise ConfigError(
      f"{config.name} fits on {topology.text} with no mesh that was tried: take more devices, or optimizer.offload=true, or "
      "a train.global_batch that more powers of two divide"
    )
  plans.sort(key=rank)
  return best_compiled(plans, topology, program, progress) if compile else plans


def best_compiled(plans, topology, program, progress):
  """`plans`, of which the first are compiled until COMPILED of them fit, or twice as many were tried: those that fit first,
  and the compiled ones before the others. One that does not compile is left out."""
  found, untried = [], list(plans)
  while untried and len(plans) - len(untried) < 2 * COMPILED and sum(plan.fits for plan in found) < COMPILED:
    plan = untried.pop(0)
    progress(f"compiling {named(plan.config)}")
    try:
      found.append(make_plan(plan.config, topology, program, compile=True))
    except ConfigError as error:
      progress(f"not this one: {error}")
  if not found:
    raise ConfigError(f"XLA compiles none of the best meshes on {topology.text}: see --analytic")
  return sorted(found + untried, key=lambda plan: (not plan.fits, plan.source == "analytic", plan.calibrated.seconds))


def rank(plan: Plan):
  return not plan.fits, plan.calibrated.seconds


def starts(config: Config, topology: Topology) -> list[Choice]:
  moe, found = config.model.moe, []
  plain = Choice(1, 1, 1, 1, 1, "full", moe.buffer_factor or BUFFERS[0] * bool(moe.num_routed_experts))
  try:
    config = resolve_mesh(config, topology.devices)
  except ConfigError:
    pass  # it is for other machines
  else:
    m = config.mesh
    rows = (config.train.microbatch or config.train.global_batch) // (
      topology.devices // (m.tensor * m.stage * m.context)
    )
    found = [Choice(m.expert, m.tensor, m.stage, m.context, max(rows, 1), config.model.remat, plain.buffer)]
  experts = (2**i for i in range(moe.num_routed_experts.bit_length()) if moe.num_routed_experts % 2**i == 0)
  return found + [dataclasses.replace(plain, expert=expert) for expert in experts or [1]]


def applied(choice: Choice, config: Config, topology: Topology) -> Config | None:
  """`config` with what was chosen, or None where that does not divide the devices, the batch or the model."""
  axes = {axis: getattr(choice, axis) for axis in TRIED}
  others = choice.tensor * choice.stage * choice.context
  microbatch = topology.devices // others * choice.rows
  train, moe = config.train, config.model.moe
  fsdp, left = divmod(topology.devices, others * choice.expert * topology.slices)
  shared_out = choice.expert == 1 or moe.num_routed_experts
  if (
    left
    or not fsdp
    or not shared_out
    or train.global_batch % microbatch
    or (train.batch_ramp_from or microbatch) % microbatch
  ):
    return None
  mesh = MeshConfig(data=topology.slices, fsdp=fsdp, **axes)
  moe = dataclasses.replace(moe, buffer_factor=choice.buffer if choice.expert > 1 else moe.buffer_factor)
  model = dataclasses.replace(config.model, remat=choice.remat, moe=moe)
  train = dataclasses.replace(train, microbatch=microbatch)
  try:
    return resolve_mesh(dataclasses.replace(config, model=model, mesh=mesh, train=train), topology.devices)
  except ConfigError:
    return None


def named(config: Config) -> str:
  mesh = " ".join(f"{axis}={getattr(config.mesh, axis)}" for axis in AXES if getattr(config.mesh, axis) > 1)
  room = f", buffer {config.model.moe.buffer_factor:g}" if config.mesh.expert > 1 else ""
  return f"{mesh or 'one device'}, microbatch {config.train.microbatch}, remat {config.model.remat}{room}"


def ranking(plans) -> str:
  """Plans in their order, a line each."""
  lines = ["  step s    MFU  GiB  fits  bound         source    mesh"]
  for plan in plans:
    c = plan.calibrated
    lines.append(
      f"{c.seconds:8.2f}  {plan.mfu(c):5.1%} {plan.total / GIB:4.0f}  {'yes ' if plan.fits else 'NO  '}  {c.bound:12}  "
      f"{plan.source:8}  {named(plan.config)}"
    )
  return "\n".join(lines)
