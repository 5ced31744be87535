"""The compute-optimal allocation that plans go by: DeepSeek's, or one refitted from a table of runs, with its interval."""

import dataclasses

from deepseek_jax.scaling.laws import DEEPSEEK_ALLOCATION, AllocationLaw


@dataclasses.dataclass(frozen=True)
class AllocationEstimate:
  """A law, and the laws of bootstrap samples, whose spread is its interval; none: it was published without one."""

  law: AllocationLaw
  samples: tuple[AllocationLaw, ...] = ()


DEEPSEEK = AllocationEstimate(DEEPSEEK_ALLOCATION)


def refit_allocation(table): ...
