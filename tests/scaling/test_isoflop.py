import numpy as np
import pytest

from deepseek_jax.errors import DataError
from deepseek_jax.scaling.isoflop import fit_envelope, fit_isoflop
from deepseek_jax.scaling.table import read_table
from tests.scaling import tables

PORIAN_FITS = tables.rows_of("porian_fits.csv")


@pytest.mark.parametrize("row", PORIAN_FITS, ids=lambda row: "-".join(row[name] for name in tables.SETTING))
def test_the_exponents_of_porian_et_al(row):
  where = ",".join(f"{name}={row[name]}" for name in tables.SETTING)
  fit = fit_isoflop(read_table(tables.PORIAN, tables.PORIAN_COLUMNS, where), "N", bootstrap=0)
  assert fit.interpolation == "akima"
  assert fit.a == pytest.approx(float(row["basic.n_exponent"]), abs=0.005)


def test_deepseek_s_exponents_from_parabolic_profiles():
  fit = fit_isoflop(read_table(tables.S3, tables.S3_COLUMNS), "M", bootstrap=100)
  assert fit.interpolation == "parabola"
  assert fit.a == pytest.approx(0.5243, abs=0.003) and fit.b == pytest.approx(0.4757, abs=0.003)
  low, high = np.quantile(fit.samples[:, 0], [0.025, 0.975])
  assert low < 0.5243 < high


def test_the_envelope_finds_the_exponents_of_dense_profiles(tmp_path):
  columns = tables.isoflop_runs(np.geomspace(1e17, 1e21, 9), sizes=41, span=3, noise=1e-5)
  fit = fit_envelope(tables.made_table(tmp_path / "t.csv", columns), "M", bootstrap=20)
  assert fit.a == pytest.approx(tables.CHINCHILLA.a, abs=0.01) and fit.a + fit.b == pytest.approx(1, abs=1e-6)
  value, interval = fit.optimal(1e22)
  assert interval[0] <= value <= interval[1]


def test_seeds_of_one_setting_count_as_their_mean_and_give_the_noise(tmp_path):
  columns = tables.isoflop_runs(np.array([1e17, 1e18, 1e19]))
  center = np.flatnonzero(np.arange(21) % 7 == 3)
  extra = {name: np.concatenate([values, values[center]]) for name, values in columns.items()}
  extra["val_loss"][center] *= 1.01
  extra["val_loss"][21:] /= 1.01
  extra["seed"] = np.array([0] * 21 + [1] * 3)
  fit = fit_isoflop(tables.made_table(tmp_path / "t.csv", extra), "M", bootstrap=5)
  plain = fit_isoflop(tables.made_table(tmp_path / "p.csv", columns), "M", bootstrap=0)
  assert fit.a == pytest.approx(plain.a, abs=1e-3)
  assert fit.noise == pytest.approx(np.log(1.01) * np.sqrt(2), rel=1e-6)


def test_the_loss_of_a_larger_budget_is_predicted(tmp_path):
  columns = tables.isoflop_runs(np.geomspace(1e17, 1e20, 6))
  fit = fit_isoflop(tables.made_table(tmp_path / "t.csv", columns), "M", bootstrap=50)
  scale = tables.CHINCHILLA.coefficient(1.0) * 1e21**tables.CHINCHILLA.a
  truth = tables.CHINCHILLA.loss(scale, 1e21 / scale)
  assert fit.predict(1e21)[0] == pytest.approx(truth, rel=0.005)
  assert fit.predict(1e21, fixed_E=1.69)[0] == pytest.approx(truth, rel=0.002)


def test_three_budgets_tell_a_floor(tmp_path):
  scale = tables.CHINCHILLA.coefficient(1.0) * 1e20**tables.CHINCHILLA.a
  truth, inside = tables.CHINCHILLA.loss(scale, 1e20 / scale), 0
  for seed in range(8):
    columns = tables.isoflop_runs(np.geomspace(1e17, 1e19, 3), sizes=9, noise=2e-3, seed=seed)
    fit = fit_isoflop(tables.made_table(tmp_path / "t.csv", columns), "M", bootstrap=60, seed=seed)
    value, (low, high) = fit.predict(1e20)
    assert value == pytest.approx(truth, rel=0.02)
    inside += low < truth < high
  assert inside >= 6


def test_without_known_noise_there_is_no_interval(tmp_path):
  few = tables.isoflop_runs(np.array([1e18, 1e19]), sizes=3, span=2)
  fit = fit_isoflop(tables.made_table(tmp_path / "t.csv", few), "M")
  assert fit.noise is None and fit.samples is None and fit.optimal(1e20)[1] is None
  four = tables.isoflop_runs(np.geomspace(1e17, 1e19, 3), sizes=4, noise=0.01)
  fit = fit_isoflop(tables.made_table(tmp_path / "f.csv", four), "M", bootstrap=100)
  assert 0.003 < fit.noise < 0.03
  low, high = np.quantile(fit.samples[:, 0], [0.025, 0.975])
  assert low < tables.CHINCHILLA.a < high


def test_the_envelope_of_a_grid_of_sizes_knows_its_edges_and_its_spacing(tmp_path):
  sizes, tokens = np.repeat(np.geomspace(3e7, 3e10, 12), 12), np.tile(np.geomspace(1e9, 1e12, 12), 12)
  columns = {"params": sizes, "tokens": tokens, "flops": 6 * sizes * tokens}
  columns["val_loss"] = tables.CHINCHILLA.loss(sizes, tokens)
  fit = fit_envelope(tables.made_table(tmp_path / "t.csv", columns), "N", bootstrap=200)
  assert all(v.is_edge for v in fit.vertices if v.scale in (sizes[0], sizes[-1]))
  low, high = np.quantile(fit.samples[:, 0], [0.025, 0.975])
  assert high - low > 0.01


def test_a_best_size_at_the_edge_is_not_fitted(tmp_path):
  columns = tables.isoflop_runs(np.geomspace(1e17, 1e20, 4))
  keep = np.ones(28, bool)
  keep[4:7] = False  # the first budget lacks its large models
  columns = {name: values[keep] for name, values in columns.items()}
  columns["val_loss"][0:4] = np.linspace(5.0, 4.0, 4)
  fit = fit_isoflop(tables.made_table(tmp_path / "t.csv", columns), "M", bootstrap=10)
  assert [v.is_edge for v in fit.vertices] == [True, False, False, False]
  assert fit.a == pytest.approx(tables.CHINCHILLA.a, abs=0.02)


def test_one_budget_and_no_optimum_inside_are_refused(tmp_path):
  one = tables.isoflop_runs(np.array([1e18]))
  with pytest.raises(DataError, match="1 compute budgets"):
    fit_isoflop(tables.made_table(tmp_path / "t.csv", one), "M")
  falling = tables.isoflop_runs(np.array([1e17, 1e18]))
  falling["val_loss"] = np.tile(np.linspace(5, 4, 7), 2)
  with pytest.raises(DataError, match=r"fewer than two budgets have an optimum inside"):
    fit_isoflop(tables.made_table(tmp_path / "t.csv", falling), "M")
