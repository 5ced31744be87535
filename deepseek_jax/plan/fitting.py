"""The smallest change with which a step that does not fit its devices would fit, by the estimate of its memory."""

from collections.abc import Iterator
from typing import NamedTuple

from deepseek_jax.config import Config
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import load_config
from deepseek_jax.mesh import min_devices
from deepseek_jax.plan.memory import estimate_memory
from deepseek_jax.plan.topology import Topology
from deepseek_jax.schema import flatten_config

MORE_DEVICES = (2, 4, 8, 16, 32, 64)  # times those of the plan


class Change(NamedTuple):
  """Fields to set on `devices` devices, and the estimated bytes on each of them then."""

  fields: dict[str, str | int | bool]
  devices: int
  memory_bytes: int


def smallest_fitting_change(config: Config, topology: Topology, memory_bytes: int) -> Change | None:
  """The first change with which a step of `config`, whose mesh is resolved, fits; None where none that is tried does.

  Tried in this order: a smaller microbatch, rematerialization, the optimizer's state in host memory, and more devices
  for FSDP with these.

  Args:
    memory_bytes: of the plan, on a device. Where XLA compiled it, estimates are scaled by what it allocates.
  """
  scale = memory_bytes / estimate_memory(config, topology.chip).total_bytes
  for fields in _changes(config):
    try:
      changed = load_config(None, flatten_config(config) | fields)
    except ConfigError:
      continue  # these sizes do not divide
    memory = int(scale * estimate_memory(changed, topology.chip).total_bytes)
    if memory <= topology.chip.hbm_capacity:
      return Change(fields, min_devices(changed.mesh), memory)
  return None


def _changes(config: Config) -> Iterator[dict[str, str | int | bool]]:
  """Fields to set, the smallest change first."""
  train, mesh = config.train, config.mesh
  microbatch = train.microbatch or train.global_batch
  batch_shards = mesh.data * mesh.fsdp * mesh.expert
  halves = [microbatch >> i for i in range(microbatch.bit_length()) if microbatch % (batch_shards << i) == 0]
  microbatches: list[dict[str, str | int | bool]] = [{"train.microbatch": size} for size in halves if size < microbatch]
  remat: dict[str, str | int | bool] = {"model.remat": "full"} if config.model.remat in ("none", "dots") else {}
  offload: dict[str, str | int | bool] = {} if config.optimizer.offload else {"optimizer.offload": True}
  yield from microbatches
  if remat:
    yield remat
    yield from ({**remat, **size} for size in microbatches)
  smallest = microbatches[-1] if microbatches else {}
  if offload:
    yield {**remat, **smallest, **offload}
  for factor in MORE_DEVICES:
    # As many sequences on a device as they are now, and then as few as can be.
    for size in (microbatch * factor, batch_shards * factor):
      if train.global_batch % size == 0:
        for others in ({}, remat, {**remat, **offload}):
          yield {"mesh.fsdp": mesh.fsdp * factor, "train.microbatch": size, **others}
