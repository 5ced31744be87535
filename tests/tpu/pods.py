"""Meshes of TPU pods, none of which is here, and the update compiled for them."""

import dataclasses
import re
from collections import Counter

import jax

from deepseek_jax.config import Config
from deepseek_jax.config_sections import MeshConfig
from deepseek_jax.mesh import make_mesh
from deepseek_jax.plan.compile import CompiledProgram, compile_for_tpu, topology_devices
from deepseek_jax.plan.hlo import HloProgram
from deepseek_jax.plan.topology import parse_topology
from deepseek_jax.sharding import elements_per_device
from deepseek_jax.training.step import abstract_step

REMATERIALIZED = "nvoluntary full rematerialization"
_STABLEHLO = re.compile(r"stablehlo\.(all_gather|all_reduce|reduce_scatter|all_to_all|collective_permute)\"?\(")


def pod(topology, **sizes):
  """The mesh of `sizes` on the chips of `topology`. Nothing can run on it, not even jax.random.key(0)."""
  return make_mesh(MeshConfig(**({"data": 1} | sizes)), topology_devices(parse_topology(topology)))


@dataclasses.dataclass(frozen=True)
class Step:
  """A compiled update; `held`: bytes of its state on a device; `parameters` of the whole model."""

  config: Config
  sizes: dict
  held: int
  parameters: int
  compiled: CompiledProgram
  program: HloProgram


def step_for(topology, sizes, config) -> Step:
  mesh = pod(topology, **sizes)
  with jax.set_mesh(mesh):
    step, arguments = abstract_step(config, mesh)
    held = sum(elements_per_device(a) * a.dtype.itemsize for a in jax.tree.leaves(arguments[0]))
    parameters = sum(a.size for a in jax.tree.leaves(arguments[0].params))
    program = compile_for_tpu(step, *arguments, donate_argnums=0)
  return Step(config, sizes, held, parameters, program, HloProgram(program.hlo, dict(mesh.shape)))


def check_collectives(step: Step):
  """The messages are those that the program says, and none carries more than a layer's weights, or the tokens' rows."""
  found = Counter(c.kind for c in step.program.collectives())
  written = Counter(name.replace("_", "-") for name in _STABLEHLO.findall(step.compiled.stablehlo))
  # Where a group of devices fills all three dimensions of a torus, libtpu makes gathers and scatters of all-reduces.
  sums = ("all-gather", "all-reduce", "reduce-scatter")
  assert 0 < sum(found[kind] for kind in sums) <= sum(written[kind] for kind in sums)
  # A dispatch of rows with its narrow message, and a combine: forward, recomputed, and backward; the last combine of
  # the recomputation is not needed by all. In the layers, and in multi-token prediction.
  mixtures = 1 + step.config.model.num_mtp_layers
  assert 8 * mixtures <= found["ragged-all-to-all"] <= 9 * mixtures
  assert found["all-to-all"] <= written["all-to-all"]
  # XLA shifts small pieces of what it gathers; whole streams go from stage to stage alone.
  stages, model = step.sizes.get("stage", 1) > 1, step.config.model
  stream = step.config.data.seq // step.sizes.get("tensor", 1) // step.sizes.get("context", 1) * model.embed * 2
  permuted = {
    c.axes for c in step.program.collectives() if c.kind == "collective-permute" and c.largest_array_bytes >= stream
  }
  assert permuted == ({("stage",)} if stages else set()) and ("collective-permute" in written) == stages
  # In loops over layers and microbatches nothing is larger than the weights of a layer or the head, whole on a device.
  experts = model.moe.num_routed_experts // step.sizes.get("expert", 1)
  weights = max(model.vocab, experts * model.moe.mlp, model.mlp) * model.embed * 2
  rows = 2 * step.config.data.seq * model.moe.num_experts_per_token * model.embed * 2
  largest = max(c.largest_array_bytes for c in step.program.collectives() if c.count > 1)
  assert largest <= max(weights, rows * step.config.train.microbatch // _rows(step.sizes)), (largest, weights, rows)


def _rows(sizes):
  """Devices that share the batch."""
  return sizes.get("data", 1) * sizes.get("fsdp", 1) * sizes.get("expert", 1)
