"""The compute-optimal allocation that plans go by: DeepSeek's, or one refitted from a table of runs, with its interval."""

import dataclasses

import numpy as np

from deepseek_jax.scaling.intervals import Interval, percentile_interval
from deepseek_jax.scaling.isoflop import fit_isoflop
from deepseek_jax.scaling.laws import DEEPSEEK_ALLOCATION, Allocation, AllocationLaw, PowerLaw
from deepseek_jax.scaling.table import RunTable


@dataclasses.dataclass(frozen=True)
class AllocationEstimate:
  """A law, and the laws of bootstrap samples, whose spread is its interval; none: it was published without one."""

  law: AllocationLaw
  samples: tuple[AllocationLaw, ...] = ()

  def optimal(self, flops: float, ci: float = 0.95) -> tuple[Allocation, Interval | None]:
    """(allocation of `flops`, interval of its scale)."""
    return self.law.optimal(flops), self._interval([law.optimal(flops).scale for law in self.samples], ci)

  def for_tokens(self, tokens: float, ci: float = 0.95) -> tuple[Allocation, Interval | None]:
    """(allocation at which `tokens` are optimal, interval of its scale)."""
    return self.law.for_tokens(tokens), self._interval([law.for_tokens(tokens).scale for law in self.samples], ci)

  def _interval(self, scales: list[float], ci: float) -> Interval | None:
    return percentile_interval(np.array(scales), ci) if scales else None


DEEPSEEK = AllocationEstimate(DEEPSEEK_ALLOCATION)


def refit_allocation(table: RunTable, bootstrap: int = 1000) -> AllocationEstimate:
  """The allocation law of a table of IsoFLOP runs (approach 2). Parameters N, of a table without M, are M / 6.

  Raises DataError.
  """
  scale = table.default_scale()
  factor = 6.0 if scale != "M" else 1.0
  fit = fit_isoflop(table, scale, bootstrap=bootstrap)

  def law(log_g: float, a: float) -> AllocationLaw:
    return AllocationLaw(table.path, PowerLaw(factor * float(np.exp(log_g)), float(a)))

  rows = () if fit.samples is None else fit.samples[:, :4]
  laws = tuple(law(log_g, a) for a, _, log_g, _ in rows if np.isfinite([log_g, a]).all() and a < 1)
  return AllocationEstimate(law(float(np.log(fit.G)), fit.a), laws)
