"""The best mesh for a config on a topology: many are planned without a compiler, the best few with it."""

import dataclasses
import itertools
import math

from deepseek_jax.config import Config, MeshConfig
from deepseek_jax.errors import ConfigError
from deepseek_jax.mesh import AXES, resolve_mesh
from deepseek_jax.plan.memory import estimate_memory
from deepseek_jax.plan.plan import Plan, make_plan
from deepseek_jax.plan.topology import GIB, Topology

TRACED, COMPILED = 24, 3  # candidates that are planned, and those of them that are compiled, unless said otherwise
# Shares of a step that the remat policies compute again, roughly.
RECOMPUTED = {"none": 0.0, "dots": 0.05, "full": 0.25, "offload": 0.27}
SLACK = 1.1  # estimated memory of a candidate may be that much over the limit: the estimate is no better


def search(
  config: Config, topology: Topology, program, compile=False, fused_attention=False, progress=print, most=TRACED
) -> list[Plan]:
  """Plans of other meshes, microbatches, buffer factors and remat policies than `config` has, the fastest that fits first.

  Raises ConfigError where no mesh works at all. Arguments as in `make_plan`; `progress` is told what happens, and at
  `most` candidates are planned.
  """
  found = [c for c in candidates(config, topology) if estimate_memory(c).total <= SLACK * topology.chip.hbm]
  if not found:
    raise ConfigError(
      f"{config.name} fits on {topology.text} with no mesh that was tried: take more devices, or optimizer.offload=true, or "
      "a train.global_batch that more powers of two divide"
    )
  by_mesh = {}
  for candidate in sorted(found, key=cheapness):
    by_mesh.setdefault(candidate.mesh, []).append(candidate)
  found = sorted((c for of_mesh in by_mesh.values() for c in of_mesh[:2]), key=cheapness)[:most]
  plans = []
  for number, candidate in enumerate(found, 1):
    progress(f"{number} of {len(found)}: {named(candidate)}")
    plans.append(make_plan(candidate, topology, program, fused_attention=fused_attention))
  plans.sort(key=rank)
  if compile:
    best = []
    for plan in plans[:COMPILED]:
      progress(f"compiling {named(plan.config)}")
      try:
        best.append(make_plan(plan.config, topology, program, compile=True))
      except ConfigError as error:
        progress(f"not this one: {error}")
    plans = sorted(best + plans[COMPILED:], key=rank)
    if not plans:
      raise ConfigError(f"XLA compiles none of the best meshes of {config.name} on {topology.text}: see --analytic")
  return plans


def rank(plan: Plan):
  return not plan.fits, plan.calibrated.seconds


def candidates(config: Config, topology: Topology):
  """Configs with meshes that use all devices, and what goes with them."""
  moe, train = config.model.moe, config.train
  devices, layers = topology.devices, config.model.num_moe_layers or config.model.num_dense_layers
  experts = powers(moe.num_routed_experts) if moe.num_routed_experts else [1]
  stages = [s for s in (1, 2, 4, 8, 16) if s <= layers]
  for expert, tensor, stage, context in itertools.product(experts, (1, 2, 4, 8), stages, (1, 2, 4)):
    rest, left = divmod(devices, expert * tensor * stage * context * topology.slices)
    if left or not rest:
      continue
    mesh = MeshConfig(data=topology.slices, fsdp=rest, expert=expert, tensor=tensor, stage=stage, context=context)
    parts = topology.slices * rest * expert  # that share the batch
    # Room for what a device receives: the config's own, or one and a half and twice an even load.
    buffers = (moe.buffer_factor,) if expert == 1 or moe.buffer_factor else (1.5, 2.0)
    for rows, (remat, buffer) in itertools.product((1, 2, 4, 8), itertools.product(RECOMPUTED, buffers)):
      micro = parts * rows
      if train.global_batch % micro or (train.batch_ramp_from and train.batch_ramp_from % micro):
        continue
      try:
        yield resolve_mesh(varied(config, mesh, micro, remat, buffer), devices)
      except ConfigError:  # this one does not divide the model: the next may
        continue


def varied(config: Config, mesh, microbatch, remat, buffer):
  moe = dataclasses.replace(config.model.moe, buffer_factor=buffer)
  model = dataclasses.replace(config.model, remat=remat, moe=moe)
  train = dataclasses.replace(config.train, microbatch=microbatch)
  return dataclasses.replace(config, model=model, mesh=mesh, train=train)


def powers(limit):
  return [2**i for i in range(limit.bit_length()) if limit % 2**i == 0]


def cheapness(config: Config):
  """Which candidates to look at first: without stages, few gathers of weights, little recomputation."""
  mesh, train = config.mesh, config.train
  microbatches = train.global_batch // train.microbatch
  gathered = microbatches * (mesh.fsdp > 1) / max(mesh.expert, 1)
  recomputed = RECOMPUTED[config.model.remat]
  if mesh.stage > 1:  # which compute everything again, and gather weights in every tick
    recomputed = 0.3 + RECOMPUTED["full"] + (mesh.stage - 1) / (microbatches + mesh.stage - 1)
  return recomputed + 0.05 * math.log2(mesh.tensor * mesh.stage * mesh.context) + 0.01 * gathered


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
