"""The check for silent data corruption: a device that computes wrong, and raises no error.

Before some steps one microbatch is computed twice, by one compiled program, and what each device computed is compared bit
by bit, by checksums. The state of the run is read and not changed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from deepseek_jax.config import Config
from deepseek_jax.distributed import broadcast_from_process0, gather_to_host, host_names
from deepseek_jax.kernels.implementations import Replacements
from deepseek_jax.model.transformer import graphdef
from deepseek_jax.sharding import axis_size
from deepseek_jax.training.batch import Batch
from deepseek_jax.training.checked_pass import jit_checked_pass, rotate_batch
from deepseek_jax.training.schedule import StepInputs
from deepseek_jax.training.state import TrainState
from deepseek_jax.training.step_config import StepConfig

HOW_TO = "docs/howto/find_silent_corruption.md"


class Corrupted(RuntimeError):
  """Devices computed something else when they computed a microbatch again."""

  exit_code = 43  # of a program: the machine is to be replaced


class CorruptionCheck:
  """The check of one run, every `train.sdc_every` steps and before the first one.

  Args:
    config: its mesh sizes may be unresolved.
    step_config: of the run's step.
    mesh: the one that is set.
    replacements: those that are set.
    log_event: as RunLog.event.
    saved_steps: gives the steps of the checkpoints.
  """

  def __init__(
    self,
    config: Config,
    step_config: StepConfig,
    mesh: Mesh,
    replacements: Replacements,
    log_event: Callable[..., None],
    saved_steps: Callable[[], Sequence[int]],
  ):
    self._config, self._mesh, self._log_event, self._saved_steps = config, mesh, log_event, saved_steps
    self._checked_pass = jit_checked_pass(step_config, graphdef(config.model), replacements)
    self._passed: int | None = None  # step of the last check that found nothing

  def is_due(self, step: int) -> bool:
    """Whether to check before the step that follows `step` updates."""
    return self._passed is None or step % self._config.train.sdc_every == 0

  def run(self, step: int, tokens: int, state: TrainState, batch: Batch) -> None:
    """Checks the devices with the first microbatch of `batch`. All processes have to call this.

    step, tokens: completed updates, and the tokens they were trained on.

    Raises Corrupted, on all processes, after an event with the devices.
    """
    rotate = self._config.train.sdc_rotate
    inputs = StepInputs.at(self._config, step, tokens, batch.target_tokens)
    mtp_weight = inputs.as_arrays(self._config.model.param_dtype).mtp_weight

    def checksums(tokens):
      return jax.tree.map(
        gather_to_host, self._checked_pass(state.params, state.buffers, tokens, mtp_weight, state.step)
      )

    first = checksums(batch.tokens)
    second = checksums(rotate_batch(batch.tokens) if rotate else batch.tokens)
    # Process 0 decides for all: they have to end together.
    found = broadcast_from_process0(
      lambda: compare_rotated(first, second) if rotate else compare_repeated(first, second)
    )
    if found:
      self._report(step, *found)
    self._passed = step

  def _report(self, step: int, suspects: Sequence[int], what: str) -> None:
    hosts = host_names()
    devices = [describe_device(self._mesh.devices.flat[i], self._mesh, hosts) for i in suspects]
    self._log_event("corruption", step, devices=devices, what=what, last_passed=self._passed)
    several = len(devices) > 1
    exchanged = several and not self._config.train.sdc_rotate and axis_size("stages", "experts", "stream") > 1
    one_of = "; they exchange activations: at least one of them computed wrong" if exchanged else ""
    raise Corrupted(
      f"step {step}: silent data corruption. {what}: {'devices' if several else 'device'} "
      f"{'; '.join(map(format_device, devices))}{one_of}. Exclude the host, and {self._way_back()}. {HOW_TO} says more"
    )

  def _way_back(self) -> str:
    """How to go on: from the newest checkpoint that is not newer than the last check that found nothing."""
    steps = sorted(self._saved_steps())
    trusted = [step for step in steps if self._passed is not None and step <= self._passed]
    if not steps:
      return "start again: there is no checkpoint"
    if self._passed is None:
      return f"run the same command again, which continues from step {steps[-1]}: this was its first check"
    if not trusted:
      return f"start again in another --workdir: no checkpoint is from before step {self._passed}, the last check that found nothing"
    return (
      f"run the same command with --resume_from={trusted[-1]}, the newest checkpoint from before the last check that found "
      f"nothing, at step {self._passed}"
    )


def compare_repeated(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> tuple[list[int], str] | None:
  """(indices of the devices, what differs) of two passes on the same arguments; None where they are equal.

  first, second: `checked_pass.Checksums`. A device whose own values differ is told from those that received a sum with them.
  """
  differs = {name: first[name] != second[name] for name in first}
  own = differs["forward"].any(1) | differs["backward"].any(1)
  names = " and ".join(name for name in ("forward", "backward") if differs[name].any())
  if own.any():
    return np.flatnonzero(own).tolist(), f"A microbatch computed twice gave other bits in the {names} pass"
  if differs["sums"].any():
    count = int(differs["sums"].any(0).sum())
    what = f"A microbatch computed twice gave the same gradients on each device and other sums of {count} of them over devices"
    return np.flatnonzero(differs["sums"].any(1)).tolist(), what
  return None


def compare_rotated(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> tuple[list[int], str] | None:
  """As `compare_repeated`, where device i + 1 had the sequences of device i in the second pass.

  A difference is between two devices. One that is part of two differences is named alone.
  """
  names = ("forward", "backward")
  differs = np.any([(first[name] != np.roll(second[name], -1, 0)).any(1) for name in names], 0)  # [devices]
  if not differs.any():
    return None
  involved = differs.astype(int) + np.roll(differs, 1)  # device i has the sequences of i, and then of i - 1
  suspects = np.flatnonzero(involved == involved.max()).tolist()
  return suspects, "Two devices gave other bits for the same sequences"


def describe_device(device: jax.Device, mesh: Mesh, hosts: Sequence[str]) -> dict[str, Any]:
  """What tells a device of `mesh` from others, for an event. hosts: of the processes."""
  of_process = sorted(other.id for other in mesh.devices.flat if other.process_index == device.process_index)
  described = {"id": device.id, "kind": device.device_kind, "host": hosts[device.process_index]}
  described |= {"process": device.process_index, "number_in_process": of_process.index(device.id)}
  if not hasattr(device, "coords"):
    return described
  # A TPU: where its chip is in the slice, which core of the chip, which slice.
  place = {"coordinates": list(device.coords), "core": device.core_on_chip, "slice": getattr(device, "slice_index", 0)}
  return described | place


def format_device(device: dict[str, Any]) -> str:
  """A device of an event, in a line for people."""
  others = ", ".join(
    f"{name.replace('_', ' ')} {value}" for name, value in device.items() if name not in ("id", "kind")
  )
  return f"{device['id']} ({device['kind']}, {others})"
