"""Scaling-law experiments: plan, run, fit and report. The command line is `python -m deepseek_jax.scaling`.

from deepseek_jax import scaling
table = scaling.read_table("runs.csv")
fit = scaling.fit_isoflop(table, "M")
fit.optimal(1e21)
"""

import importlib
from typing import Any

_MODULES = {
  "allocation": ("AllocationEstimate", "refit_allocation"),
  "analysis": ("FitOptions", "ScalingFit", "fit_table", "split_holdout"),
  "budgets": ("BudgetRuns",),
  "cost": ("format_plan",),
  "counting": (
    "ModelParameters", "MoEStats", "count_params", "deepseek_flops_per_token", "moe_stats", "nonembedding_flops_per_token",
  ),
  "hparams": ("HyperparamFit", "fit_hyperparams", "load_law"),
  "isoflop": (
    "FrontierFit", "Vertex", "akima_vertex", "budget_profiles", "fit_envelope", "fit_isoflop", "parabola_vertex",
    "profile_curve",
  ),
  "laws": ("HYPERPARAM_LAWS", "HyperparamLaw", "PowerLaw", "TrainingRun", "optimal_allocation"),
  "other_laws": ("LAWS", "LawFit", "fit_law", "fit_moe", "fit_repeated_data"),
  "parametric": ("ParametricFit", "ParametricOptions", "Surface", "fit_parametric", "fit_surface"),
  "prediction": ("add_prediction", "judge"),
  "published": ("published_exponents", "read_published"),
  "report": ("write_report",),
  "shapes": ("MoEVariant", "find_shape"),
  "sweep_plan": ("PlannedRun", "SweepOptions", "SweepPlan", "load_plan", "plan_sweep"),
  "sweep_results": ("RunResult", "read_result", "table_rows"),
  "sweep_runs": ("run_sweep",),
  "table": ("RunTable", "format_csv", "read_table"),
}  # fmt: skip
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
  """A public name, imported when asked for: a fit of a table needs no JAX."""
  if name in _HOME:
    return getattr(importlib.import_module(f"deepseek_jax.scaling.{_HOME[name]}"), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  """The public names, for tab completion, also before they are imported."""
  return sorted({*globals(), *__all__})
