"""What a sweep costs."""

import dataclasses
from typing import Any

from deepseek_jax.scaling.sweep_plan import SweepPlan


@dataclasses.dataclass(frozen=True)
class Cost:
  flops: float

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)


def format_plan(plan: SweepPlan, cost: Cost) -> str:
  return f"{len(plan.runs)} runs, {plan.flops:.4g} FLOPs"


def format_advice(): ...
def sweep_cost(): ...
