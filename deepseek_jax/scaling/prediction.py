"""Preregistered predictions: the loss at a plan's largest budget, told from smaller ones before it runs, and their judgement."""

import dataclasses
from typing import Any

import numpy as np

from deepseek_jax.errors import DataError
from deepseek_jax.scaling.budgets import SAME_BUDGET
from deepseek_jax.scaling.isoflop import LEAST_SIZES, fit_isoflop
from deepseek_jax.scaling.parametric import fit_parametric
from deepseek_jax.scaling.sweep_plan import SweepPlan
from deepseek_jax.scaling.table import RunTable


def add_prediction(plan: SweepPlan, table: RunTable, bootstrap: int = 1000) -> tuple[SweepPlan, str]:
  """(the plan with a prediction for its largest budget, text for people).

  The prediction is of the smallest loss at that budget, that of the compute-optimal model: by approach 2's vertices, and by
  approach 3 for comparison. Raises DataError where the table already has runs of that budget.
  """
  budget = max(run.budget for run in plan.runs)
  if table.flops().max() > budget * 0.95:
    raise DataError(
      f"--preregister={table.path} has runs of {budget:.3g} FLOPs, the plan's largest budget: a prediction comes before them"
    )
  loss_name, scale = table.loss_name(), "M"
  frontier = fit_isoflop(table, scale, bootstrap=bootstrap)
  predicted, interval = frontier.predict(budget)
  optimum, optimum_interval = frontier.optimal(budget)
  by_surface, surface_interval = fit_parametric(table, scale, bootstrap=bootstrap).loss_at_optimum(budget)
  prediction = {
    "budget": budget, "loss": loss_name, "rows": len(table), "largest_fitted": float(table.flops().max()),
    "approach": 2, "predicted": predicted, "ci": interval, "M_opt": {"predicted": optimum, "ci": optimum_interval},
    "approach_3": {"predicted": by_surface, "ci": surface_interval},
  }  # fmt: skip
  text = (
    f"prediction   {loss_name} at the optimum of {budget:.3g} FLOPs: {predicted:.4f}"
    + (f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval else "")
    + f" by approach 2, {by_surface:.4f} by approach 3, from {len(table)} runs of up to {table.flops().max():.3g} FLOPs"
  )
  return dataclasses.replace(plan, prediction=prediction), text


def judge(prediction: dict[str, Any], table: RunTable) -> dict[str, Any] | None:
  """What came of a prediction: measured, error = predicted / measured - 1, and whether the interval holds it.

  measured: the vertex of the budget's profile (approach 2); None where that has none, for the `reason`. None instead of all
  where the budget has not run.
  """
  if not (np.abs(np.log(table.flops() / prediction["budget"])) < SAME_BUDGET).any():
    return None
  try:
    vertices = fit_isoflop(table, "M", bootstrap=0).vertices
  except DataError as error:
    return {"measured": None, "reason": str(error)}
  vertex = next((v for v in vertices if abs(np.log(v.flops / prediction["budget"])) < SAME_BUDGET), None)
  if vertex is None:
    return {"measured": None, "reason": f"fewer than {LEAST_SIZES} sizes of that budget have run"}
  interval = prediction["ci"]
  return {
    "measured": vertex.loss, "error": prediction["predicted"] / vertex.loss - 1,
    "error_of_approach_3": prediction["approach_3"]["predicted"] / vertex.loss - 1,
    "inside": bool(interval[0] <= vertex.loss <= interval[1]) if interval else None, "is_edge": vertex.is_edge,
  }  # fmt: skip
