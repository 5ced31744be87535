"""Which kernels a run uses, at which shapes: recorded from its own training step, traced for the device."""

import dataclasses
from collections import Counter, defaultdict

import jax
from jax.sharding import AbstractDevice

from deepseek_jax.config import Config
from deepseek_jax.kernels.implementations import Call, import_libraries, record_calls
from deepseek_jax.mesh import abstract_mesh
from deepseek_jax.selftest.operations import KERNEL_SPECS, KernelSpec
from deepseek_jax.training.step import abstract_step


@dataclasses.dataclass(frozen=True)
class Case:
  """A call to test.

  covers: keys of the program's calls for which it is tested: the same call, larger ones, and of some kernels smaller
  ones.
  """

  call: Call
  covers: tuple[str, ...]

  @property
  def spec(self) -> KernelSpec:
    return KERNEL_SPECS[self.name]

  @property
  def name(self) -> str:
    """ "kernel.function"."""
    return self.call.name

  @property
  def key(self) -> str:
    return self.call.key

  @property
  def work(self) -> float:
    """FLOPs or bytes, see `KernelSpec.unit`."""
    return self.spec.work(*self.call.arguments)


def program_calls(config: Config, device: AbstractDevice) -> list[Call]:
  """The Pallas kernel calls of a training step of `config`, whose mesh is resolved, on such devices, each once.

  Nothing runs, without the devices. Raises ConfigError as the step does.
  """
  mesh = abstract_mesh(config.mesh, device)
  with jax.sharding.use_abstract_mesh(mesh), record_calls() as calls:
    import_libraries()
    step, arguments = abstract_step(config, mesh)
    jax.jit(step, donate_argnums=0).trace(*arguments)
  return list(calls.values())


def make_cases(calls: list[Call]) -> list[Case]:
  """The cases to test, most important first: the largest of each function, then the second largest, and so on."""
  groups = defaultdict(list)
  for call in calls:
    spec = KERNEL_SPECS[call.name]
    smaller = dataclasses.replace(call, arguments=spec.shrink(*call.arguments))
    groups[_key_without_tiles(smaller) if spec.largest_only else smaller.key].append((smaller, call.key))
  cases = []
  for members in groups.values():
    largest = max((smaller for smaller, _ in members), key=lambda call: Case(call, ()).work)
    cases.append(Case(largest, tuple(key for _, key in members)))
  next_rank: Counter[str] = Counter()
  ranks = {}
  for case in sorted(cases, key=lambda case: -case.work):
    ranks[case.key] = next_rank[case.name]
    next_rank[case.name] += 1
  return sorted(cases, key=lambda case: (ranks[case.key], -case.work))


def _key_without_tiles(call: Call) -> str:
  """As `call.key`, with array dimensions modulo 128: calls are equal that differ only in their number of full tiles."""

  def remainder(x):
    if not isinstance(x, jax.ShapeDtypeStruct):
      return x
    leading = (1,) * (x.ndim - 2)
    return jax.ShapeDtypeStruct((*leading, *(n % 128 for n in x.shape[-2:])), x.dtype)

  return dataclasses.replace(call, arguments=tuple(map(remainder, call.arguments))).key
