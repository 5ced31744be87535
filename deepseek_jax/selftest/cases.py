"""Which kernels a run takes, at which shapes: read off its own training step, traced for the device."""

import dataclasses
from collections import Counter, defaultdict

import jax
from jax.sharding import AbstractDevice

from deepseek_jax.config import Config
from deepseek_jax.kernels.implementations import Call, import_libraries, record_calls
from deepseek_jax.mesh import abstract_mesh
from deepseek_jax.selftest.operations import OPERATIONS
from deepseek_jax.training.step import abstract_step


@dataclasses.dataclass(frozen=True)
class Case:
  """A call to test, and which calls of the program it stands for: the same one, larger ones, and of some kernels smaller ones."""

  call: Call
  stands_for: tuple[str, ...]

  @property
  def operation(self):
    return OPERATIONS[self.name]

  @property
  def name(self) -> str:
    return self.call.name

  @property
  def key(self) -> str:
    return self.call.key

  @property
  def work(self) -> float:
    """FLOPs or bytes."""
    return self.operation.work(*self.call.arguments)


def program_calls(config: Config, device: AbstractDevice) -> list[Call]:
  """The Pallas kernels that a training step of `config`, whose mesh is resolved, calls on such devices, each once.

  Nothing runs and the devices need not be here. Raises ConfigError as the step does.
  """
  mesh = abstract_mesh(config.mesh, device)
  with jax.sharding.use_abstract_mesh(mesh), record_calls() as calls:
    import_libraries()
    step, arguments = abstract_step(config, mesh)
    jax.jit(step, donate_argnums=0).trace(*arguments)
  return list(calls.values())


def make_cases(calls: list[Call]) -> list[Case]:
  """What to test, the most important first: of each function the case with the most work, then the second of each ..."""
  groups = defaultdict(list)
  for call in calls:
    operation = OPERATIONS[call.name]
    cut = dataclasses.replace(call, arguments=operation.cut(*call.arguments))
    groups[_without_sizes(cut) if operation.merge else cut.key].append((cut, call.key))
  cases = []
  for members in groups.values():
    largest = max((cut for cut, _ in members), key=lambda cut: Case(cut, ()).work)
    cases.append(Case(largest, tuple(name for _, name in members)))
  rank, ranks = Counter(), {}
  for case in sorted(cases, key=lambda case: -case.work):
    ranks[case.key] = rank[case.name]
    rank[case.name] += 1
  return sorted(cases, key=lambda case: (ranks[case.key], -case.work))


def _without_sizes(call: Call) -> str:
  """As `call.key`, but of array dimensions only what is beyond whole tiles of 128."""
  rest = lambda x: jax.ShapeDtypeStruct((*(1,) * (x.ndim - 2), *(n % 128 for n in x.shape[-2:])), x.dtype)
  arguments = (rest(x) if isinstance(x, jax.ShapeDtypeStruct) else x for x in call.arguments)
  return dataclasses.replace(call, arguments=tuple(arguments)).key
