import numpy as np
import pytest

from deepseek_jax.errors import DataError
from deepseek_jax.scaling.budgets import BudgetRuns
from deepseek_jax.scaling.isoflop import (
  akima_vertex,
  fit_envelope,
  fit_isoflop,
  parabola_vertex,
  profile_curve,
)
from deepseek_jax.scaling.published import published_exponents, read_published
from deepseek_jax.scaling.table import read_table
from tests.scaling import tables

PORIAN = published_exponents("porian2024")


@pytest.mark.parametrize("setting", PORIAN)
def test_the_exponents_of_porian_et_al(setting):
  fit = fit_isoflop(read_published("porian2024", setting), "N", bootstrap=0)
  assert fit.interpolation == "akima"
  assert fit.a == pytest.approx(PORIAN[setting], abs=0.005)


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


def chinchilla_profile(flops=1e20, span=8.0):
  optimum = tables.CHINCHILLA.optimal(flops, 6.0)
  scales = optimum * np.geomspace(1 / span, span, 9)
  tokens = flops / (6 * scales)
  return optimum, BudgetRuns(flops, scales, tokens, tables.CHINCHILLA.loss(scales, tokens), 0)


def test_the_curve_of_an_interpolation_has_its_vertex():
  _, runs = chinchilla_profile()
  fine = np.geomspace(runs.scales[0], runs.scales[-1], 20_001)
  for name, vertex in (("akima", akima_vertex(runs)), ("parabola", parabola_vertex(runs))):
    curve = profile_curve(runs, name, fine)
    assert fine[curve.argmin()] == pytest.approx(vertex.scale, rel=1e-3)
    assert curve.min() == pytest.approx(vertex.loss, rel=1e-6)
  assert profile_curve(runs, "akima", runs.scales) == pytest.approx(runs.losses, rel=1e-12)
  assert np.isnan(profile_curve(runs, "akima", np.array([runs.scales[-1] * 2]))).all()


def test_a_wider_parabola_misses_the_optimum_of_a_surface_by_more(tmp_path):
  optimum, runs = chinchilla_profile()
  off = [abs(np.log(parabola_vertex(runs, span).scale / optimum)) for span in (2.0, 4.0, 8.0)]
  assert off[0] < off[1] < off[2]
  columns = tables.isoflop_runs(np.geomspace(1e17, 1e20, 4), sizes=9, span=8)
  table = tables.made_table(tmp_path / "t.csv", columns)
  wide, narrow = (fit_isoflop(table, "M", "parabola", bootstrap=0, span=span) for span in (8.0, 2.0))
  truth = tables.CHINCHILLA.coefficient(1.0)
  assert abs(np.log(narrow.vertices[0].scale / (truth * 1e17**tables.CHINCHILLA.a))) < abs(
    np.log(wide.vertices[0].scale / (truth * 1e17**tables.CHINCHILLA.a))
  )
