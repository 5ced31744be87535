import json

import numpy as np
import pytest

from deepseek_jax.errors import ConfigError, DataError
from deepseek_jax.scaling.hparams import fit_hyperparams, load_law
from deepseek_jax.scaling.laws import TrainingRun
from tests.scaling import tables


def grid(budgets, noise=0.0, steps=7):
  """Runs around DeepSeek's law: log loss is a parabola of both fields around 0.8 and 1.25 of what the law says."""
  generator, columns = (
    np.random.default_rng(0),
    {n: [] for n in ("flops", "M", "tokens", "lr", "batch_tokens", "val_loss")},
  )
  for flops in budgets:
    for x in np.geomspace(0.25, 4, steps):
      for y in np.geomspace(0.25, 4, steps):
        scale = 0.1715 * flops**0.5243
        loss = 3 * np.exp(0.004 * np.log(x / 0.8) ** 2 + 0.002 * np.log(y / 1.25) ** 2 + noise * generator.normal())
        row = (flops, scale, flops / scale, 0.3118 * flops**-0.125 * x, 0.292 * flops**0.3271 * y, loss)
        for name, value in zip(columns, row, strict=True):
          columns[name].append(value)
  return {name: np.array(values) for name, values in columns.items()}


def test_the_laws_are_found_again(tmp_path):
  table = tables.made_table(tmp_path / "t.csv", grid(np.geomspace(1e17, 2e19, 5)))
  fit = fit_hyperparams(table, bootstrap=200)
  assert fit.laws["lr"].exponent == pytest.approx(-0.125, abs=1e-6)
  assert fit.laws["lr"].coefficient == pytest.approx(0.3118 * 0.8, rel=1e-4)
  assert fit.laws["batch_tokens"].exponent == pytest.approx(0.3271, abs=1e-6)
  assert fit.laws["batch_tokens"].coefficient == pytest.approx(0.292 * 1.25, rel=1e-4)


def test_noise_widens_the_interval_and_it_holds_the_truth(tmp_path):
  table = tables.made_table(tmp_path / "t.csv", grid(np.geomspace(1e17, 1e20, 6), noise=5e-4))
  fit = fit_hyperparams(table, bootstrap=200)
  low, high = fit.interval("lr", 1)
  assert low < -0.125 < high and high - low > 1e-4
  basin = fit.basins[0]
  assert basin.low["lr"] < basin.center["lr"] < basin.high["lr"] and basin.near > 5


def test_seeds_of_one_setting_count_as_their_mean(tmp_path):
  columns = grid([1e18], steps=5)
  lucky = int(columns["val_loss"].argmax())  # the worst setting, with one lucky seed
  extra = {name: np.append(values, values[lucky]) for name, values in columns.items()}
  extra["val_loss"][lucky] *= 1.5
  extra["val_loss"][-1] = columns["val_loss"].min() * 0.9
  extra["seed"] = np.array([0] * 25 + [1])
  fit = fit_hyperparams(tables.made_table(tmp_path / "t.csv", extra))
  assert fit.basins[0].best["lr"] == columns["lr"][columns["val_loss"].argmin()]
  assert any("which settings are near-optimal is chance" in line for line in fit.diagnostics())


def test_plans_take_the_file_that_hparams_writes(tmp_path):
  table = tables.made_table(tmp_path / "t.csv", grid([1e17, 1e18, 1e19]))
  path = tmp_path / "law.json"
  path.write_text(json.dumps(fit_hyperparams(table, bootstrap=10).to_json()))
  law, run = load_law(str(path)), TrainingRun(1e21, 1.0, 1.0)
  assert law.lr(run) == pytest.approx(0.3118 * 0.8 * 1e21**-0.125, rel=1e-3) and law.name == "law.json"
  path.write_text("{}")
  with pytest.raises(ConfigError, match="hparams --json"):
    load_law(str(path))


def test_one_budget_has_an_optimum_and_no_exponent(tmp_path):
  fit = fit_hyperparams(tables.made_table(tmp_path / "t.csv", grid([1e18])))
  tree = fit.to_json()
  assert tree["lr"]["exponent"] is None and len(tree["basins"]) == 1
  assert "one budget: an exponent needs two at least" in tree["diagnostics"]
  assert fit.basins[0].center["lr"] == pytest.approx(0.3118 * 1e18**-0.125 * 0.8, rel=1e-4)


def test_an_optimum_at_the_edge_is_said(tmp_path):
  columns = grid([1e18])
  columns["val_loss"] = 3 * columns["lr"] / columns["lr"].max()
  fit = fit_hyperparams(tables.made_table(tmp_path / "t.csv", columns))
  assert any("lr" in line and "may be outside" in line for line in fit.diagnostics())


def test_a_table_may_lack_scale_tokens_and_one_of_the_fields(tmp_path):
  columns = grid(np.geomspace(1e17, 1e19, 3))
  bare = {name: columns[name] for name in ("flops", "lr", "batch_tokens", "val_loss")}
  fit = fit_hyperparams(tables.made_table(tmp_path / "b.csv", bare), bootstrap=10)
  assert fit.laws["lr"].exponent == pytest.approx(-0.125, abs=1e-4)
  center = np.abs(columns["batch_tokens"] / (0.292 * columns["flops"] ** 0.3271) - 1) < 1e-6
  only_lr = {name: columns[name][center] for name in ("flops", "lr", "val_loss")}
  fit = fit_hyperparams(tables.made_table(tmp_path / "l.csv", only_lr), bootstrap=10)
  assert set(fit.laws) == {"lr"} and fit.to_json()["batch_tokens"]["exponent"] is None
  assert fit.laws["lr"].exponent == pytest.approx(-0.125, abs=1e-4)


def test_tables_that_vary_nothing_are_refused(tmp_path):
  columns = tables.isoflop_runs([1e17, 1e18]) | {"lr": np.full(14, 1e-3), "batch_tokens": np.full(14, 1e5)}
  with pytest.raises(DataError, match="--grid_budget"):
    fit_hyperparams(tables.made_table(tmp_path / "t.csv", columns))
