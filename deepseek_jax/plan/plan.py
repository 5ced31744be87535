"""A plan: what a step of a config needs and how fast it is on a topology that need not be here."""

import dataclasses
from collections import defaultdict

import jax
from jax.sharding import AbstractDevice

from deepseek_jax.config import Config
from deepseek_jax.errors import ConfigError
from deepseek_jax.kernels.grouped_matmul.api import block_rows
from deepseek_jax.mesh import AXES, abstract_mesh, check_slices, make_mesh, resolve_mesh
from deepseek_jax.model.expert_parallel import has_ragged_all_to_all
from deepseek_jax.model.transformer import check_kernels
from deepseek_jax.parallel.pipeline import num_ticks
from deepseek_jax.plan import roofline
from deepseek_jax.plan.child import ADVICE, in_child
from deepseek_jax.plan.compiled import OutOfMemory, compiled, devices
from deepseek_jax.plan.count import Loops, Operation, counted
from deepseek_jax.plan.flops import DEVICE, training_flops
from deepseek_jax.plan.hlo import Program
from deepseek_jax.plan.memory import estimate_memory, fused_attention
from deepseek_jax.plan.topology import GIB, Topology


@dataclasses.dataclass(frozen=True)
class Plan:
  """`memory`: bytes on a device by part. `collectives`: {kind: {axes: bytes that a device sends in a step}}. FLOPs are of all
  devices: `model_flops` 6 x active parameters and causal attention, `compiled_flops` what the program does (of grouped products as traced, but on
  v5p). `source`:
  "compiled" by XLA, or "analytic"; `compile_seconds` of CPU time, when it was first compiled."""

  config: Config
  topology: Topology
  memory: dict
  model_flops: float
  compiled_flops: float
  collectives: dict
  ideal: roofline.Estimate
  calibrated: roofline.Estimate
  source: str
  compile_seconds: float

  @property
  def total(self):
    return sum(self.memory.values())

  @property
  def fits(self):
    return self.total <= self.topology.chip.hbm

  @property
  def tokens(self):
    return self.config.train.global_batch * self.config.data.seq

  def mfu(self, estimate):
    """Of bfloat16's peak, also of FP8 GEMMs."""
    return self.model_flops / (self.topology.devices * self.topology.chip.flops * estimate.seconds)

  def json(self) -> dict:
    c = self.calibrated
    parts = lambda e: {f"{name}_seconds": getattr(e, name) for name in ("compute", "hbm", "interconnect")}
    return {
      "fits": self.fits, "topology": self.topology.text, "devices": self.topology.devices,
      "mesh": {axis: getattr(self.config.mesh, axis) for axis in AXES},
      "hbm_bytes_per_device": {**self.memory, "total": self.total, "limit": int(self.topology.chip.hbm)},
      "step_seconds": c.seconds, "tokens_per_second": self.tokens / c.seconds, "mfu": self.mfu(c), "bound": c.bound,
      "calibrated": {"seconds": c.seconds, "mfu": self.mfu(c), "bound": c.bound, **parts(c)},
      "ideal": {"seconds": self.ideal.seconds, "mfu": self.mfu(self.ideal), "bound": self.ideal.bound, **parts(self.ideal)},
      "model_flops": self.model_flops, "compiled_flops": self.compiled_flops, "collective_bytes": self.collectives,
      "source": self.source, "compile_seconds": self.compile_seconds,
    }  # fmt: skip


def make_plan(config: Config, topology: Topology, program, compile=False) -> Plan:
  """The Plan of `config`, whose mesh may be open, on `topology`.

  Args:
    program: (config, mesh) -> (the step, its abstract arguments), of a mesh that is set; a module's own function, since
      another process compiles.
    compile: for a TPU topology, with libtpu: memory and messages are those of the compiled program.

  Raises:
    ConfigError: a mesh that cannot work, or kernels that the chip does not have.
  """
  config = resolve_mesh(config, topology.devices)
  device = AbstractDevice(topology.chip.kind, 1, "tpu" if topology.is_tpu else "gpu")
  with jax.sharding.use_abstract_mesh(abstract_mesh(config.mesh, device)):
    check_kernels(config.model)
  sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
  check_slices(tuple(sizes.values()), topology.slices)
  loops = expected_loops(config, topology.chip.kind)
  kernels = topology.is_tpu or fused_attention(config, topology.chip)
  operations = traced(config if kernels else without_kernels(config), program, sizes, loops)
  if not has_ragged_all_to_all(topology.chip.kind):
    operations = [dataclasses.replace(o, kind=o.kind.removeprefix("ragged-")) for o in operations]
  flops, seconds = sum(o.times * o.flops for o in operations), 0.0
  memory = dataclasses.asdict(estimate_memory(config, topology.chip))
  if compile:
    built, total = in_child(compiled_step, config, topology, program)
    # The parts are the estimate's, but for those that are exact in proportion to what XLA allocates.
    exact = memory["params"] + memory["optimizer"]
    share = (total - exact) / (sum(memory.values()) - exact)
    memory = {name: size if name in ("params", "optimizer") else int(size * share) for name, size in memory.items()}
    if built:
      hlo, seconds = Program(built.hlo, sizes, loops.trips, loops.taken), built.seconds
      flops = hlo.product_flops(loops.full_rows)
      messages = [Operation(c.kind, c.times, axes=c.axes, sent=c.sent) for c in hlo.collectives(loops.sent_rows)]
      messages += [
        Operation("all-reduce", hlo.times[name], axes=AXES[:1], sent=size) for name, size in hlo.between_slices()
      ]
      # Their memory traffic stays with the traced ones.
      operations = [dataclasses.replace(o, axes=(), sent=0) for o in operations] + messages
  sent = defaultdict(lambda: defaultdict(float))
  for o in operations:
    if o.sent:
      sent[o.kind]["x".join(o.axes)] += o.times * o.sent
  useful = training_flops(config.model, config.data.seq).causal * config.train.global_batch * config.data.seq
  block = config.model.fp8.block
  estimates = (estimate(operations, topology, sizes, block) for estimate in (roofline.ideal, roofline.calibrated))
  sent = {kind: dict(by_axes) for kind, by_axes in sent.items()}
  source = "compiled" if compile else "analytic"
  return Plan(config, topology, memory, useful, flops * topology.devices, sent, *estimates, source, seconds)


def without_kernels(config: Config) -> Config:
  """`config` with XLA's attention."""
  attention = dataclasses.replace(config.model.attention, implementation="xla")
  return dataclasses.replace(config, model=dataclasses.replace(config.model, attention=attention))


def traced(config, program, sizes, loops) -> list[Operation]:
  """Operations of a step; as for a v5p, whatever the chip: grouped products and messages are then one operation each."""
  mesh = abstract_mesh(config.mesh, DEVICE)
  with jax.sharding.use_abstract_mesh(mesh):
    step, arguments = program(config, mesh)
    return counted(jax.jit(step, donate_argnums=0).trace(*arguments).jaxpr, sizes, loops)


def compiled_step(config, topology, program, log=None):
  """(Compiled or None where it does not fit, bytes on a device); `log` as in `compiled`."""
  mesh = make_mesh(config.mesh, devices(topology))
  with jax.set_mesh(mesh):
    step, arguments = program(config, mesh)
    try:
      found = compiled(step, *arguments, log=log, donate_argnums=0)
    except OutOfMemory as error:
      return None, error.args[0]
    except jax.errors.JaxRuntimeError as error:
      reason = str(error).strip().splitlines()[0]
      raise ConfigError(f"XLA cannot compile this for {topology.text} ({reason:.200}): {ADVICE}") from None
  return found, found.device


def expected_loops(config: Config, device_kind) -> Loops:
  """What tokens that choose experts evenly and a schedule of stages make of a step."""
  moe, mesh, train = config.model.moe, config.mesh, config.train
  microbatch = train.microbatch or train.global_batch
  found = Loops()
  if mesh.stage > 1:
    ticks, layers, groups = num_ticks(mesh.stage, config.parallel.virtual_stages, train.global_batch // microbatch)
    # In the order of Work.tick in parallel/pipeline.py.
    taken = tuple(n / ticks for n in (groups, groups, layers, groups, layers))
    found = dataclasses.replace(found, trips=ticks, taken=taken)
  if not moe.num_routed_experts:
    return found
  tokens = microbatch // (mesh.data * mesh.fsdp * mesh.expert) * config.data.seq // mesh.context
  load, each = tokens * moe.num_experts_per_token, moe.num_routed_experts // mesh.expert
  most = mesh.expert * tokens * min(moe.num_experts_per_token, each)
  most = min(most, int(moe.buffer_factor * load)) if moe.buffer_factor and mesh.expert > 1 else most
  block = block_rows(load, each)
  full = (load + each * block / 2) / (-(-most // block) * block + each * block)
  # Distinct devices among the choices of a token, within the groups that it may choose from.
  reachable = max(mesh.expert * moe.topk_groups / moe.num_expert_groups, 1)
  distinct = reachable * (1 - (1 - 1 / reachable) ** moe.num_experts_per_token)
  sent = min(distinct / min(moe.num_experts_per_token, mesh.expert), 1)
  if not has_ragged_all_to_all(device_kind):  # as many rows to every device
    sent = mesh.expert / min(moe.num_experts_per_token, mesh.expert)
  return dataclasses.replace(found, full_rows=min(full, 1), sent_rows=sent)


def table(plan: Plan) -> str:
  """A plan for people."""
  t, config, memory = plan.topology, plan.config, plan.memory
  mesh = " x ".join(f"{axis}={getattr(config.mesh, axis)}" for axis in AXES if getattr(config.mesh, axis) > 1)
  train = config.train
  lines = [
    f"plan       {config.name} on {t.text}: {t.devices} x {t.chip.kind}, {plan.source}"
    + (f" in {plan.compile_seconds:.0f} s of CPU time" if plan.compile_seconds else ""),
    f"mesh       {mesh or 'one device'}",
    f"batch      {train.global_batch:,} sequences of {config.data.seq:,} in "
    f"{train.global_batch // (train.microbatch or train.global_batch)} microbatches, remat {config.model.remat}",
    f"memory     {plan.total / GIB:.1f} of {t.chip.hbm / GIB:.1f} GiB a device: {'fits' if plan.fits else 'DOES NOT FIT'} ("
    + ", ".join(f"{name} {size / GIB:.1f}" for name, size in memory.items())
    + ")",
    f"FLOPs      {plan.model_flops:.3g} of the model, {plan.compiled_flops:.3g} of the program",
  ]
  for kind, by_axes in plan.collectives.items():
    sent = ", ".join(
      f"{axes} {size / GIB:.2f}" for axes, size in sorted(by_axes.items(), key=lambda i: -i[1]) if size > 1e6
    )
    if sent:
      lines.append(f"sends      {kind}: GiB a device and step over {sent}")
  for name in ("ideal", "calibrated"):
    e = getattr(plan, name)
    lines.append(
      f"{name:10} {e.seconds:.4g} s a step, {plan.tokens / e.seconds:,.0f} tokens/s, MFU {plan.mfu(e):.1%}, bound by {e.bound} "
      f"(compute {e.compute:.3g}, hbm {e.hbm:.3g}, interconnect {e.interconnect:.3g})"
    )
  return "\n".join(lines)
