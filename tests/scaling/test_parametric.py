import subprocess
import sys

import numpy as np
import pytest

from deepseek_jax.errors import DataError
from deepseek_jax.scaling.parametric import NAMES, ParametricOptions, fit_parametric, fit_surface
from deepseek_jax.scaling.published import read_published
from deepseek_jax.scaling.table import read_table
from tests.scaling import tables

RPJ = read_published("gadre2024", "dataset=rpj").cells


def gadre(rows):
  return tuple(np.array([float(row[name]) for row in rows]) for name in ("params", "tokens", "loss_c4_val"))


def test_a_surface_without_noise_is_found_to_1e_5():
  fit = fit_parametric(read_table(tables.S1), "N", bootstrap=0)
  for name in NAMES:
    assert getattr(fit.surface, name) == pytest.approx(getattr(tables.CHINCHILLA, name), rel=1e-5)
  assert fit.surface.a == pytest.approx(0.28 / 0.62, abs=1e-6) and fit.optima == 1


def test_five_small_runs_predict_large_ones_as_gadre_et_al_say():
  small = [r for r in RPJ if "open_lm" not in r["model"] and float(r["chinchilla_multiplier"]) == 1]
  small += [r for r in RPJ if r["model"] == "d=96_l=8_h=4" and float(r["chinchilla_multiplier"]) == 16]
  assert len(small) == 5
  fit = fit_surface(*gadre(small), ParametricOptions(tied=True, objective="squares"), bootstrap=0)
  errors = {}
  for row in RPJ:
    n, d, loss = (x[0] for x in gadre([row]))
    errors[row["model"], round(d / n)] = fit.surface.loss(n, d) / loss - 1
  assert errors["open_lm_1b", 640] == pytest.approx(0.007103, abs=1e-5)
  assert errors["open_lm_7b", 20] == pytest.approx(0.007320, abs=1e-5)


def test_all_smaller_runs_predict_the_larger_ones_within_1_2_percent():
  runs = [r for r in RPJ if float(r["chinchilla_multiplier"]) >= 0.5]
  n, d, loss = gadre(runs)
  small = 6 * n * d < 2e20
  assert small.sum() == 26
  fit = fit_surface(n[small], d[small], loss[small], bootstrap=0)
  errors = fit.surface.loss(n[~small], d[~small]) / loss[~small] - 1
  assert np.abs(errors).mean() <= 0.012


def test_intervals_hold_the_truth_and_shrink_with_the_noise():
  widths = []
  for noise in (0.01, 0.002):
    columns = tables.isoflop_runs(np.geomspace(1e17, 1e20, 5), noise=noise)
    fit = fit_surface(columns["M"], columns["tokens"], columns["val_loss"], bootstrap=200, per_scale=1.0)
    low, high = np.quantile(fit.samples.a, [0.025, 0.975])
    assert low < tables.CHINCHILLA.a < high
    widths.append(high - low)
    value, interval = fit.optimal(1e21)
    assert interval[0] < value < interval[1]
    value, interval = fit.predict(1e9, 1e11)
    assert interval[0] < value < interval[1]
    value, interval = fit.loss_at_optimum(1e21)
    assert interval[0] < tables.CHINCHILLA.loss(*_optimum(1e21)) < interval[1]
  assert widths[1] < widths[0] / 3


def _optimum(flops):
  scale = tables.CHINCHILLA.coefficient(1.0) * flops**tables.CHINCHILLA.a
  return scale, flops / scale


def test_given_and_prior_irreducible_losses():
  columns = tables.isoflop_runs(np.geomspace(1e17, 1e19, 4), noise=0.003)
  data = columns["M"], columns["tokens"], columns["val_loss"]
  fixed = fit_surface(*data, ParametricOptions(fixed_E=1.5), bootstrap=20)
  assert fixed.surface.E == pytest.approx(1.5) and np.allclose(fixed.samples.E, 1.5)
  free = fit_surface(*data, bootstrap=0).surface.E
  strong = fit_surface(*data, ParametricOptions(prior_E=(1.2, 1e-4)), bootstrap=0).surface.E
  weak = fit_surface(*data, ParametricOptions(prior_E=(1.2, 100.0)), bootstrap=0).surface.E
  assert abs(strong - 1.2) < 0.01 and abs(weak - free) < 0.01 < abs(free - 1.2)


def test_leaving_out_an_outlier_moves_the_exponent_most():
  columns = tables.isoflop_runs(np.geomspace(1e17, 1e19, 4), noise=0.002)
  columns["val_loss"][27] *= 1.1
  data = columns["M"], columns["tokens"], columns["val_loss"]
  fit = fit_surface(*data, ParametricOptions(objective="squares"), bootstrap=0, per_scale=1.0)
  without = fit.without_each_run()
  assert np.abs(without - fit.surface.a).argmax() == 27
  kept = np.arange(28) != 27
  again = fit_surface(*(x[kept] for x in data), ParametricOptions(objective="squares"), bootstrap=0, per_scale=1.0)
  assert without[27] == pytest.approx(again.surface.a, abs=1e-4)


def test_bad_settings_and_seeds_do_not_count_as_runs_of_their_own(tmp_path):
  columns = tables.isoflop_runs(np.geomspace(1e17, 1e20, 4), sizes=7, noise=1e-4)
  plain = fit_parametric(tables.made_table(tmp_path / "p.csv", columns), "M", bootstrap=0).surface
  columns |= {"lr": np.full(28, 1e-3), "seed": np.zeros(28)}
  repeated = {name: np.concatenate([values, np.repeat(values[10], 8)]) for name, values in columns.items()}
  repeated["lr"][28:] = np.geomspace(1e-5, 1e-1, 8)
  repeated["val_loss"][28:] *= np.linspace(1.01, 1.06, 8)
  fit = fit_parametric(tables.made_table(tmp_path / "t.csv", repeated), "M", bootstrap=0)
  assert len(fit.rows) == 28 and fit.surface.a == pytest.approx(plain.a, abs=1e-6)


def test_equal_losses_are_refused():
  with pytest.raises(DataError, match="same loss"):
    fit_surface(np.geomspace(1e8, 1e9, 9), np.geomspace(1e9, 1e10, 9), np.full(9, 3.0))


def test_too_few_runs_are_refused():
  with pytest.raises(DataError, match="4 runs for 5 parameters"):
    fit_surface(*np.ones((3, 4)))


PROGRAM = """
import sys
if sys.argv[1] != "none":
  import jax
  jax.config.update("jax_enable_x64", sys.argv[1] == "true")
from deepseek_jax import scaling
fit = scaling.fit_parametric(scaling.read_table(sys.argv[2]), "N", bootstrap=3)
s = fit.surface
print(*(float(x).hex() for x in (s.E, s.A, s.B, s.alpha, s.beta, *fit.samples.a)), fit.samples.a.dtype)
"""


def test_precision_does_not_depend_on_jax_s_x64_flag():
  def run(flag):
    return subprocess.run(
      [sys.executable, "-c", PROGRAM, flag, tables.S1], capture_output=True, text=True, check=True
    ).stdout  # fmt: skip

  without_jax = run("none")
  assert run("false") == run("true") == without_jax and without_jax.strip().endswith("float64")
