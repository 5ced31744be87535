import numpy as np
import pytest

from deepseek_jax.errors import DataError
from deepseek_jax.scaling.analysis import FitOptions, fit_table
from deepseek_jax.scaling.parametric import ParametricOptions
from tests.scaling import tables

BUDGETS = np.geomspace(1e17, 1e20, 5)


@pytest.mark.parametrize("approach", ["1", "2", "3"])
def test_the_largest_budget_is_predicted_from_the_others(tmp_path, approach):
  columns = tables.isoflop_runs(BUDGETS, sizes=9, noise=0.001)
  options = FitOptions(approach, bootstrap=30, holdout="largest")
  result = fit_table(tables.made_table(tmp_path / "t.csv", columns), options)
  assert result.rows == 36 and result.holdout.rows == (9 if approach == "3" else 1)
  assert result.holdout.flops == pytest.approx(1e20)
  assert abs(result.holdout.error) < 0.01
  assert result.holdout.error == pytest.approx(result.holdout.predicted / result.holdout.measured - 1)
  tree = result.to_json()
  assert {"a", "b", "G", "ci", "rows", "diagnostics", "holdout"} <= tree.keys()
  assert {"flops", "measured", "predicted", "ci", "error"} <= tree["holdout"].keys()
  assert {"E", "A", "B", "alpha", "beta"} <= tree.keys() if approach == "3" else "interpolation" in tree
  assert all(len(interval) == 2 for interval in tree["ci"].values()) and "a" in tree["ci"]
  assert any("held out" in line for line in result.lines())


def test_a_threshold_holds_out_all_from_there(tmp_path):
  table = tables.made_table(tmp_path / "t.csv", tables.isoflop_runs(BUDGETS))
  assert fit_table(table, FitOptions("3", bootstrap=0, holdout="1e19")).holdout.rows == 14
  for holdout, expected in (("1e30", "holds out 0"), ("1", "holds out 35"), ("big", "expected largest")):
    with pytest.raises(DataError, match=expected):
      fit_table(table, FitOptions("3", bootstrap=0, holdout=holdout))


def diagnostics(path, columns, approach="3", **options):
  return " | ".join(fit_table(tables.made_table(path, columns), FitOptions(approach, **options)).diagnostics)


def test_diagnostics_name_what_is_wrong(tmp_path):
  good = tables.isoflop_runs(BUDGETS, noise=0.002)
  assert "edge" not in diagnostics(tmp_path / "a.csv", good, "2", bootstrap=20)
  outlier = {name: values.copy() for name, values in good.items()}
  outlier["val_loss"][34] *= 1.2
  squares = ParametricOptions(objective="squares")  # Huber's loss hardly follows an outlier
  assert "influence: without row 36" in diagnostics(tmp_path / "b.csv", outlier, bootstrap=0, parametric=squares)
  repeated = good | {"unique_tokens": good["tokens"].clip(max=1e9)}
  assert "repeated data" in diagnostics(tmp_path / "c.csv", repeated, bootstrap=0)
  assert "extrapolation" not in diagnostics(tmp_path / "d.csv", good, bootstrap=0, holdout="largest")
  assert "extrapolation: held-out runs have up to 178" in diagnostics(
    tmp_path / "e.csv", good, bootstrap=0, holdout="1e18"
  )  # fmt: skip
  no_floor = good | {"val_loss": 30 / good["M"] ** 0.05 + 30 / good["tokens"] ** 0.05}
  assert "unbounded parameters" in diagnostics(tmp_path / "f.csv", no_floor, bootstrap=0)
  edge = {name: values.copy() for name, values in good.items()}
  edge["val_loss"][:7] = np.linspace(5, 4, 7)
  assert "edge vertices: at 1e+17 FLOPs" in diagnostics(tmp_path / "g.csv", edge, "2", bootstrap=0)


def test_other_laws_and_unknown_approaches(tmp_path):
  columns = tables.isoflop_runs(BUDGETS) | {"experts": np.tile([1.0, 8, 16, 32, 64], 7)}
  table = tables.made_table(tmp_path / "t.csv", columns | {"params": columns["M"] / 6})
  result = fit_table(table, FitOptions("clark", scale="N", bootstrap=0))
  assert result.to_json()["approach"] == "clark" and "source" in result.to_json()
  with pytest.raises(DataError, match="expected one of 1, 2, 3"):
    fit_table(table, FitOptions("4"))
  with pytest.raises(DataError, match="no optimal allocation"):
    result.optimal(1e20)
  two = fit_table(table, FitOptions("2", bootstrap=0))
  with pytest.raises(DataError, match="use approach 3"):
    two.predict(1e8, 1e10)
  three = fit_table(table, FitOptions("3", bootstrap=0, parametric=ParametricOptions(fixed_E=1.69)))
  assert three.predict(1e8, 1e10)[0] == pytest.approx(tables.CHINCHILLA.loss(1e8, 1e10), rel=1e-4)
  assert three.optimal(1e20)[0] == pytest.approx(two.optimal(1e20)[0], rel=0.1)
