import dataclasses
import json

import numpy as np
import pytest

from deepseek_jax.errors import DataError
from deepseek_jax.flags import load_config
from deepseek_jax.scaling.laws import hyperparam_law
from deepseek_jax.scaling.prediction import add_prediction, judge
from deepseek_jax.scaling.report import write_report
from deepseek_jax.scaling.sweep_plan import SweepOptions, load_plan, plan_sweep
from tests.scaling import tables

BUDGETS = (1e17, 5e17, 2.5e18, 1e19)


def test_a_prediction_is_made_before_the_largest_budget_and_judged_after_it(tmp_path):
  plan = plan_sweep(load_config("7b"), hyperparam_law("deepseek"), SweepOptions(BUDGETS, 3))
  small = tables.made_table(tmp_path / "s.csv", tables.isoflop_runs(BUDGETS[:3], noise=0.001))
  plan, text = add_prediction(plan, small, bootstrap=50)
  assert "prediction   val_loss at the optimum of 1e+19 FLOPs" in text
  plan.save(tmp_path / "plan.json")
  prediction = load_plan(tmp_path / "plan.json").prediction
  assert judge(prediction, small) is None
  everything = tables.made_table(tmp_path / "a.csv", tables.isoflop_runs(BUDGETS, noise=0.001))
  verdict = judge(prediction, everything)
  scale = tables.CHINCHILLA.coefficient(1.0) * 1e19**tables.CHINCHILLA.a
  assert verdict["measured"] == pytest.approx(tables.CHINCHILLA.loss(scale, 1e19 / scale), rel=0.002)
  assert abs(verdict["error"]) < 0.01 and isinstance(verdict["inside"], bool)
  with pytest.raises(DataError, match="a prediction comes before them"):
    add_prediction(plan, everything)
  write_report(everything, tmp_path / "r", plan=plan, bootstrap=10)
  numbers = json.loads((tmp_path / "r" / "numbers.json").read_text())
  assert numbers["prediction"]["verdict"] == verdict
  page = (tmp_path / "r" / "index.html").read_text()
  assert "Preregistered prediction" in page and "the interval" in page
  write_report(small, tmp_path / "r", plan=plan, bootstrap=10)
  assert "this budget has not run yet" in (tmp_path / "r" / "index.html").read_text()


def test_what_cannot_be_judged_says_why(tmp_path):
  plan = plan_sweep(load_config("7b"), hyperparam_law("deepseek"), SweepOptions(BUDGETS, 3))
  columns = tables.isoflop_runs(BUDGETS, noise=0.001)
  small = tables.made_table(tmp_path / "s.csv", {name: values[:21] for name, values in columns.items()})
  plan, _ = add_prediction(plan, small, bootstrap=20)
  two_sizes = tables.made_table(tmp_path / "t.csv", {name: values[:23] for name, values in columns.items()})
  assert judge(plan.prediction, two_sizes) == {"measured": None, "reason": "fewer than 3 sizes of that budget have run"}
  write_report(two_sizes, tmp_path / "r", plan=plan, bootstrap=10)
  assert "not judged: fewer than 3 sizes" in (tmp_path / "r" / "index.html").read_text()
  more = tables.isoflop_runs((*BUDGETS, 1e20), noise=0.001)
  verdict = judge(plan.prediction, tables.made_table(tmp_path / "m.csv", more))
  assert abs(verdict["error"]) < 0.01  # of its own budget, not of the largest in the table


def test_predictions_do_not_change_runs(tmp_path):
  plan = plan_sweep(load_config("7b"), hyperparam_law("deepseek"), SweepOptions(BUDGETS, 3))
  small = tables.made_table(tmp_path / "s.csv", tables.isoflop_runs(BUDGETS[:3], noise=0.001))
  predicted, _ = add_prediction(plan, small, bootstrap=0)
  assert dataclasses.replace(predicted, prediction=None) == plan
  assert np.isfinite(predicted.prediction["predicted"])
