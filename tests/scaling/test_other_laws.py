import numpy as np
import pytest

from deepseek_jax.errors import DataError
from deepseek_jax.scaling.other_laws import LAWS, fit_moe, fit_repeated_data
from tests.scaling import tables


def noisy(form, values, columns, noise=0.002):
  loss = form.predict(values, columns)
  return loss * np.exp(noise * np.random.default_rng(0).standard_normal(len(loss)))


def test_repeated_data_lose_value_as_they_were_made_to(tmp_path):
  n = np.tile(np.geomspace(1e7, 1e9, 6), 20)[:100]
  unique = np.repeat(np.geomspace(1e8, 1e10, 5), 20)
  columns = {"n": n, "d": unique * np.tile([1, 1, 2, 4, 8, 16, 32, 40, 60, 5], 10), "unique": unique}
  truth = {"E": 1.87, "A": 521.0, "B": 1488.0, "alpha": 0.3527, "beta": 0.3527, "R_D": 15.39, "R_N": 5.31}
  loss = noisy(LAWS["repeated"], truth, columns)
  table = {"params": n, "tokens": columns["d"], "unique_tokens": unique, "val_loss": loss}
  fit = fit_repeated_data(tables.made_table(tmp_path / "t.csv", table), bootstrap=30)
  assert fit.values["R_D"] == pytest.approx(15.39, rel=0.1) and fit.values["R_N"] == pytest.approx(5.31, rel=0.3)
  low, high = fit.interval("R_D")
  assert low < fit.values["R_D"] < high


@pytest.mark.parametrize(
  ("form", "truth"),
  [
    ("clark", {"a": -0.082, "b": -0.108, "c": 0.009, "d": 1.104, "E_start": 1.85, "E_span": 312.0}),
    (
      "ludziejewski",
      {"A": 35.91, "delta": 0.2285, "alpha": -0.1889, "gamma": -0.0098, "B": 35.98, "omega": -0.5529, "beta": -0.1775,
       "zeta": 0.0259, "E": 1.3637, "E_start": 1.5, "E_span": 300.0},
    ),
  ],
)  # fmt: skip
def test_mixtures_of_experts_are_predicted_to_the_noise(tmp_path, form, truth):
  generator = np.random.default_rng(1)
  n = np.repeat(np.geomspace(1e7, 1e9, 5), 24)
  columns = {"n": n, "d": n * np.exp(generator.uniform(1, 5, 120))}
  columns["experts"] = np.tile([1.0, 2, 4, 8, 16, 32, 64, 128], 15)
  loss = noisy(LAWS[form], truth, columns)
  table = {"params": n, "tokens": columns["d"], "experts": columns["experts"], "val_loss": loss}
  fit = fit_moe(tables.made_table(tmp_path / "t.csv", table), form, bootstrap=8)
  predicted, intervals = fit.predict(columns)
  assert np.abs(np.log(predicted / LAWS[form].predict(truth, columns))).max() < 0.004
  assert len(intervals) == 120 and all(low <= high for low, high in intervals)


def test_missing_columns_and_runs_are_refused(tmp_path):
  columns = tables.isoflop_runs([1e17, 1e18]) | {"params": np.geomspace(1e7, 1e8, 14)}
  table = tables.made_table(tmp_path / "t.csv", columns)
  with pytest.raises(DataError, match="no column 'experts'"):
    fit_moe(table)
  with pytest.raises(DataError, match="expected clark or ludziejewski"):
    fit_moe(table, "dense")
  few = {name: values[:6] for name, values in columns.items()} | {"experts": np.ones(6)}
  with pytest.raises(DataError, match="6 runs for 6 parameters"):
    fit_moe(tables.made_table(tmp_path / "f.csv", few), "clark")
