"""A plan: the HBM that a step of a config needs on a topology, and its expected step time. No accelerator is used."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AbstractDevice

from deepseek_jax.config import Config
from deepseek_jax.console import format_bytes, format_gib
from deepseek_jax.errors import ConfigError
from deepseek_jax.mesh import AXES, abstract_mesh, check_slices, make_mesh, resolve_mesh
from deepseek_jax.model.all_to_all import has_ragged_all_to_all
from deepseek_jax.model.expert_buffers import expert_buffers
from deepseek_jax.model.kernel_choice import check_kernels
from deepseek_jax.parallel.schedule import Schedule
from deepseek_jax.plan.compile import CompiledProgram, OutOfMemory, compile_for_tpu, topology_devices
from deepseek_jax.plan.count import Operation, RuntimeAssumptions, count_operations
from deepseek_jax.plan.fitting import smallest_fitting_change
from deepseek_jax.plan.flops import TRACE_DEVICE, training_flops
from deepseek_jax.plan.hlo import HloProgram
from deepseek_jax.plan.memory import estimate_memory, uses_fused_attention, with_xla_attention
from deepseek_jax.plan.roofline import StepTime, calibrated_step_time, ideal_step_time
from deepseek_jax.plan.subprocess_call import ADVICE, call_in_subprocess
from deepseek_jax.plan.topology import GIB, Topology

# (config, mesh) -> (the training step, its abstract arguments), called with that mesh set. A function of a module,
# since the process that compiles imports it.
MakeStep = Callable[[Config, Any], tuple[Callable, tuple]]


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a training step needs and how long it takes. FLOPs are of all devices."""

  config: Config
  topology: Topology
  memory: dict[str, int]  # bytes on a device, by the fields of MemoryEstimate
  model_flops: float  # 6 x active parameters and causal attention
  compiled_flops: float  # what the program executes; its grouped matmuls as traced, but as compiled on v5p
  collectives: dict[str, dict[str, float]]  # {kind: {mesh axes: bytes that a device sends in a step}}
  ideal: StepTime
  calibrated: StepTime
  source: str  # "compiled" by XLA, or "analytic"
  compile_seconds: float  # CPU time, when the step was first compiled

  @property
  def memory_bytes(self) -> int:
    """Bytes of HBM on a device."""
    return sum(self.memory.values())

  @property
  def fits(self) -> bool:
    return self.memory_bytes <= self.topology.chip.hbm_capacity

  @property
  def tokens_per_step(self) -> int:
    return self.config.train.global_batch * self.config.data.seq

  def mfu(self, time: StepTime) -> float:
    """Model FLOPs over what the devices do at bfloat16's peak in that time, with FP8 GEMMs too."""
    return self.model_flops / (self.topology.num_devices * self.topology.chip.peak_flops * time.seconds)

  def to_json(self) -> dict[str, Any]:
    """The content of --json."""
    return {
      "fits": self.fits, "topology": self.topology.text, "devices": self.topology.num_devices,
      "mesh": {axis: getattr(self.config.mesh, axis) for axis in AXES},
      "hbm_bytes_per_device": {
        **self.memory, "total": self.memory_bytes, "limit": int(self.topology.chip.hbm_capacity)
      },
      "step_seconds": self.calibrated.seconds, "tokens_per_second": self.tokens_per_step / self.calibrated.seconds,
      "mfu": self.mfu(self.calibrated), "bound": self.calibrated.bound,
      "calibrated": self._time_to_json(self.calibrated), "ideal": self._time_to_json(self.ideal),
      "model_flops": self.model_flops, "compiled_flops": self.compiled_flops, "collective_bytes": self.collectives,
      "source": self.source, "compile_seconds": self.compile_seconds,
    }  # fmt: skip

  def _time_to_json(self, time: StepTime) -> dict[str, Any]:
    return {
      "seconds": time.seconds, "mfu": self.mfu(time), "bound": time.bound, "compute_seconds": time.compute_seconds,
      "hbm_seconds": time.hbm_seconds, "interconnect_seconds": time.interconnect_seconds,
    }  # fmt: skip


def make_plan(config: Config, topology: Topology, make_step: MakeStep, compile: bool = False) -> Plan:
  """The Plan of a config on a topology.

  Args:
    config: its mesh sizes need not be resolved.
    make_step: see MakeStep.
    compile: compile the step with libtpu, for a TPU topology: memory and collectives are those of the compiled program.

  Raises:
    ConfigError: the mesh does not fit the devices, the chip lacks a kernel, or XLA cannot compile the step.
  """
  config = resolve_mesh(config, topology.num_devices)
  device = AbstractDevice(topology.chip.kind, 1, "tpu" if topology.is_tpu else "gpu")
  with jax.sharding.use_abstract_mesh(abstract_mesh(config.mesh, device)):
    check_kernels(config.model)
  mesh_sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
  check_slices(tuple(mesh_sizes.values()), topology.num_slices)
  assumptions = runtime_assumptions(config, topology.chip.kind)
  is_fused = topology.is_tpu or uses_fused_attention(config, topology.chip.kind)
  operations = trace_operations(config if is_fused else with_xla_attention(config), make_step, mesh_sizes, assumptions)
  if not has_ragged_all_to_all(topology.chip.kind):
    operations = [dataclasses.replace(o, kind=o.kind.removeprefix("ragged-")) for o in operations]
  flops, compile_seconds = sum(o.count * o.flops for o in operations), 0.0
  memory = dataclasses.asdict(estimate_memory(config, topology.chip))
  if compile:
    program, memory_bytes = call_in_subprocess(compile_step, config, topology, make_step)
    memory = _scale_to(memory, memory_bytes)
    if program:
      hlo = HloProgram(program.hlo, mesh_sizes, assumptions.trip_count, assumptions.branch_fractions)
      flops, compile_seconds = hlo.matmul_flops(assumptions.grouped_matmul_fill), program.compile_seconds
      # HBM traffic of the traced collectives stays, since HLO does not tell it.
      operations = [dataclasses.replace(o, axes=(), collective_bytes=0) for o in operations]
      operations += _compiled_collectives(hlo, assumptions)
  block = config.model.fp8.block
  return Plan(
    config, topology, memory,
    model_flops=training_flops(config.model, config.data.seq).causal * config.train.global_batch * config.data.seq,
    compiled_flops=flops * topology.num_devices,
    collectives=_collective_bytes(operations),
    ideal=ideal_step_time(operations, topology, mesh_sizes, block),
    calibrated=calibrated_step_time(operations, topology, mesh_sizes, block),
    source="compiled" if compile else "analytic",
    compile_seconds=compile_seconds,
  )  # fmt: skip


def _scale_to(memory: Mapping[str, int], memory_bytes: int) -> dict[str, int]:
  """The estimate, scaled to what XLA allocates in all. Parameters and optimizer state are exact and stay."""
  exact = ("params", "optimizer")
  exact_bytes = sum(memory[name] for name in exact)
  scale = (memory_bytes - exact_bytes) / (sum(memory.values()) - exact_bytes)
  return {name: size if name in exact else int(size * scale) for name, size in memory.items()}


def _compiled_collectives(hlo: HloProgram, assumptions: RuntimeAssumptions) -> list[Operation]:
  operations = [
    Operation(c.kind, c.count, axes=c.axes, collective_bytes=c.collective_bytes)
    for c in hlo.collectives(assumptions.ragged_fill)
  ]
  for computation, size in hlo.cross_slice_sends():
    operations.append(Operation("all-reduce", hlo.counts[computation], axes=AXES[:1], collective_bytes=size))
  return operations


def _collective_bytes(operations: list[Operation]) -> dict[str, dict[str, float]]:
  """{kind: {mesh axes, joined with x: bytes that a device sends in a step}}."""
  total: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
  for o in operations:
    if o.collective_bytes:
      total[o.kind]["x".join(o.axes)] += o.count * o.collective_bytes
  return {kind: dict(by_axes) for kind, by_axes in total.items()}


def trace_operations(
  config: Config, make_step: MakeStep, mesh_sizes: Mapping[str, int], assumptions: RuntimeAssumptions
) -> list[Operation]:
  """Operations of a step. Traced for a v5p whatever the chip, where a grouped matmul or collective is one operation."""
  mesh = abstract_mesh(config.mesh, TRACE_DEVICE)
  with jax.sharding.use_abstract_mesh(mesh):
    step, arguments = make_step(config, mesh)
    return count_operations(jax.jit(step, donate_argnums=0).trace(*arguments).jaxpr, mesh_sizes, assumptions)


def compile_step(
  config: Config, topology: Topology, make_step: MakeStep, log: str | None = None
) -> tuple[CompiledProgram | None, int]:
  """(The compiled step, or None if it does not fit; bytes of HBM on a device). `log`: see `compile_for_tpu`.

  Raises:
    ConfigError: XLA cannot compile the step.
  """
  mesh = make_mesh(config.mesh, topology_devices(topology))
  with jax.set_mesh(mesh):
    step, arguments = make_step(config, mesh)
    try:
      program = compile_for_tpu(step, *arguments, log=log, donate_argnums=0)
    except OutOfMemory as error:
      return None, error.required_bytes
    except jax.errors.JaxRuntimeError as error:
      reason = str(error).strip().splitlines()[0]
      raise ConfigError(f"XLA cannot compile this step for {topology.text} ({reason:.200}): {ADVICE}") from None
  return program, program.peak_bytes


def runtime_assumptions(config: Config, device_kind: str) -> RuntimeAssumptions:
  """Assumes that tokens choose experts evenly. Counts ticks of the pipeline schedule exactly."""
  moe, mesh, train = config.model.moe, config.mesh, config.train
  microbatch = train.microbatch or train.global_batch
  assumptions = RuntimeAssumptions()
  if mesh.stage > 1:
    num_microbatches = train.global_batch // microbatch
    schedule = Schedule(mesh.stage, config.parallel.virtual_stages, num_microbatches)
    ticks, groups = schedule.pass_ticks, schedule.groups
    # In the order of the conditionals of a tick in parallel/pipeline.py.
    fractions = tuple(n / schedule.ticks for n in (groups, groups, ticks, groups, ticks))
    assumptions = dataclasses.replace(assumptions, trip_count=schedule.ticks, branch_fractions=fractions)
  if not moe.num_routed_experts:
    return assumptions
  tokens = microbatch // (mesh.data * mesh.fsdp * mesh.expert) * config.data.seq // mesh.context
  local_experts = moe.num_routed_experts // mesh.expert
  buffers = expert_buffers(tokens, moe.num_experts_per_token, moe.num_routed_experts, mesh.expert, moe.buffer_factor)
  # Each expert's rows fill whole blocks. The last block of each is half full on average.
  used_rows = buffers.expected_assignments + local_experts * buffers.block / 2
  fill = used_rows / buffers.sorted_rows
  # Distinct devices among the experts of a token, within the groups that it may choose from.
  reachable = max(mesh.expert * moe.topk_groups / moe.num_expert_groups, 1)
  distinct_devices = reachable * (1 - (1 - 1 / reachable) ** moe.num_experts_per_token)
  sends_per_token = buffers.send_rows / tokens
  if has_ragged_all_to_all(device_kind):
    ragged_fill = min(distinct_devices / sends_per_token, 1)
  else:  # a padded all-to-all sends a row per token to every device
    ragged_fill = mesh.expert / sends_per_token
  return dataclasses.replace(assumptions, grouped_matmul_fill=min(fill, 1), ragged_fill=ragged_fill)


def format_fitting_change(plan: Plan) -> str:
  """What to change so that a plan that does not fit would."""
  change = smallest_fitting_change(plan.config, plan.topology, plan.memory_bytes)
  if not change:
    return (
      "no smaller microbatch, remat policy or number of devices that was tried would fit; --search looks for a mesh"
    )
  fields = " ".join(f"--config.{path}={str(value).lower()}" for path, value in change.fields.items())
  devices = f" on {change.devices:,} devices" if change.devices != plan.topology.num_devices else ""
  return f"would fit{devices} with {fields}: {format_bytes(change.memory_bytes)} per device by the estimate; --search looks for a mesh"


def format_plan(plan: Plan) -> str:
  """The lines that the command prints."""
  topology, config, memory = plan.topology, plan.config, plan.memory
  train, chip = config.train, topology.chip
  mesh = " x ".join(f"{axis}={getattr(config.mesh, axis)}" for axis in AXES if getattr(config.mesh, axis) > 1)
  by_part = ", ".join(f"{name} {format_gib(size, 1)}" for name, size in memory.items())
  num_microbatches = train.global_batch // (train.microbatch or train.global_batch)
  lines = [
    f"plan        {config.name} on {topology.text}: {topology.num_devices} x {chip.kind}, {plan.source}"
    + (f" in {plan.compile_seconds:.0f} s of CPU time" if plan.compile_seconds else ""),
    f"mesh        {mesh or 'one device'}",
    f"batch       {train.global_batch:,} sequences of {config.data.seq:,} tokens in {num_microbatches} microbatches, remat "
    f"{config.model.remat}",
    f"HBM         {format_gib(plan.memory_bytes, 1)} of {chip.hbm_capacity / GIB:.1f} GiB per device: "
    f"{'fits' if plan.fits else 'DOES NOT FIT'} ({by_part})",
    *([] if plan.fits else [f"            {format_fitting_change(plan)}"]),
    f"FLOPs       {plan.model_flops:.3g} model, {plan.compiled_flops:.3g} executed, per step on all devices",
  ]
  for kind, by_axes in plan.collectives.items():
    largest_first = sorted(by_axes.items(), key=lambda item: -item[1])
    sizes = ", ".join(
      f"{axes} {format_gib(size, 2)}" for axes, size in largest_first if size > min(1e6, largest_first[0][1] / 2)
    )
    if sizes:
      lines.append(f"collectives {kind}, GiB sent per device and step: {sizes}")
  for name, time in (("ideal", plan.ideal), ("calibrated", plan.calibrated)):
    lines.append(
      f"{name:11} {time.seconds:.4g} s/step, {plan.tokens_per_step / time.seconds:,.0f} tokens/s, MFU {plan.mfu(time):.1%}, "
      f"{time.bound}-bound (compute {time.compute_seconds:.3g} s, HBM {time.hbm_seconds:.3g} s, interconnect "
      f"{time.interconnect_seconds:.3g} s)"
    )
  return "\n".join(lines)
