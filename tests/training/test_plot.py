import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from deepseek_jax.training.plot import SCALES, Series, downsample, format_compact, line_chart, log_ticks, ticks


def _parse(svg):
  return ET.fromstring(svg)


def _of_class(svg, name):
  return [e for e in _parse(svg).iter() if name in e.get("class", "").split()]


@pytest.mark.parametrize(
  ("low", "high", "expected"),
  [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (1.21, 5.6, [2, 3, 4, 5]), (0, 1e-3, [0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3]),
    (-3, 3, [-2, 0, 2]),
    (9_990, 10_010, [9_990, 9_995, 10_000, 10_005, 10_010]), (0, 22_000, [0, 5000, 10_000, 15_000, 20_000]),
  ],
)  # fmt: skip
def test_ticks_are_round(low, high, expected):
  assert ticks(low, high) == expected


def test_log_ticks_are_round_and_few():
  assert log_ticks(1.3, 6) == [1.5, 2, 2.5, 3, 4, 5, 6]
  assert log_ticks(0.3, 200) == [0.5, 1, 2, 5, 10, 20, 50, 100, 200]
  assert log_ticks(1e-9, 1e9)[::2] == [1e-9, 1e-3, 1e3, 1e9]
  assert log_ticks(1.41, 1.44) == ticks(1.41, 1.44)


@pytest.mark.parametrize(
  ("value", "largest", "expected"),
  [
    (0, 0, "0"), (1500, 0, "1,500"), (5000, 20_000, "5k"), (1.5e6, 0, "1.5M"), (2e9, 0, "2G"), (2.5e-4, 1e-3, "2.5e-4"),
    (0.25, 1, "0.25"), (-3, 3, "-3"), (1e20, 0, "1e20"),
  ],
)  # fmt: skip
def test_format_compact(value, largest, expected):
  assert format_compact(value, largest) == expected


def test_downsampling_keeps_every_extreme_and_the_order():
  points = np.array([(step, math.sin(step / 300)) for step in range(1, 100_001)])
  points[54_321, 1], points[77_000, 1] = 1e3, -1e3
  sampled = downsample(points)
  assert len(sampled) <= 1000 and (np.diff(sampled[:, 0]) > 0).all()
  kept = set(map(tuple, sampled.tolist()))
  assert {(54_322, 1e3), (77_001, -1e3)} <= kept <= set(map(tuple, points.tolist()))


def test_downsampling_finds_the_extremes_of_each_bin():
  points = np.column_stack([np.arange(5000), np.random.default_rng(0).normal(size=5000)])
  points[::7, 1] = np.nan
  expected = [10 * b + f(points[10 * b : 10 * b + 10, 1]) for b in range(500) for f in (np.nanargmin, np.nanargmax)]
  np.testing.assert_array_equal(downsample(points), points[sorted(expected)])


def test_downsampling_keeps_a_stretch_without_finite_values():
  points = np.array([(step, math.nan if 4000 <= step < 6000 else 1.0) for step in range(10_000)])
  sampled = downsample(points)
  nonfinite = sampled[np.isnan(sampled[:, 1]), 0]
  assert len(nonfinite) and 4000 <= min(nonfinite) and max(nonfinite) < 6000 and len(sampled) <= 1000


def test_short_series_are_not_downsampled():
  points = np.array([(step, float(step)) for step in range(1000)])
  np.testing.assert_array_equal(downsample(points), points)


def test_points_may_be_an_array():
  points = [(1, 3.0), (2, None), (3, 2.0)]
  array = np.array([(1, 3.0), (2, math.nan), (3, 2.0)])
  assert line_chart([Series("train", points)]) == line_chart([Series("train", array)])


def test_rings_are_drawn_without_a_line():
  svg = line_chart([Series("train", [(1, 3.0), (2, 9.0), (3, 2.0)]), Series("spikes", [(2, 9.0)], "rings")])
  assert len(_of_class(svg, "curve")) == len(_of_class(svg, "ring")) == 1
  assert "train: 9 at step 2\nspikes: 9 at step 2" in [e[0].text for e in _of_class(svg, "band")]


def test_a_value_that_is_not_finite_breaks_the_line_and_is_marked():
  svg = line_chart([Series("train", [(1, 3.0), (2, 2.0), (3, None), (4, 1.5), (5, 1.4)])])
  assert len(_of_class(svg, "curve")) == 2
  assert len(_of_class(svg, "nonfinite")) == 1
  assert "not finite at step 3" in svg


def test_a_lone_point_is_visible():
  assert line_chart([Series("train", [(1, 3.0)])]).count("<circle") == 1


def test_resume_points_within_the_run_are_marked():
  svg = line_chart(
    [Series("train", [(step, 1.0 / step) for step in range(1, 50)])], marks={10: "ten", 20: "<twenty>", 900: "far"}
  )
  assert [e[0].text for e in _of_class(svg, "mark")] == ["ten", "<twenty>"]


def test_hover_titles_give_the_values_of_every_series():
  svg = line_chart([Series("train", [(1, 3.25), (2, 2.125)]), Series("<held-out>", [(2, 2.5)], "dots")])
  titles = [e[0].text for e in _of_class(svg, "band")]
  assert titles == ["train: 3.25 at step 1", "train: 2.125 at step 2\n<held-out>: 2.5 at step 2"]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
  "values",
  [
    [1e-300, 1e290],
    [0.0],
    [-1.0, 1.0],
    [5e-324, 1e-323],
    [2.0, 2.0 + 1e-15],
    [-1e290, 1e290],
    [1e-8, 1e-8],
    [0.0, 0.0],
  ],
)
def test_any_finite_values_stay_inside_the_frame(values, scale):
  svg = line_chart([Series("train", list(enumerate(values, 1)))], scale=scale)
  _, _, width, height = map(float, _parse(svg).get("viewBox").split())
  assert "nan" not in svg and "inf" not in svg
  for curve in _of_class(svg, "curve"):
    for x, y in re.findall(r"[ML](\S+) ([\d.-]+)", curve.get("d")):
      assert 0 <= float(x) <= width and 0 <= float(y) <= height


def test_without_finite_values_it_says_so():
  assert "no finite value" in line_chart([Series("train", [(1, None)])])
  assert "no finite value" in line_chart([Series("train", [])])


def test_a_chart_over_tokens_says_so_and_needs_no_whole_ticks():
  points = [(0.25, 1.0), (0.75, 2.0)]
  chart = line_chart([Series("loss", points)], x_unit="tokens")
  assert "loss: 2 at 0.75 tokens" in chart and [t.text for t in _of_class(chart, "x")][0] == "0.3"
  assert "loss: 2 at step 1" in line_chart([Series("loss", points)])


def test_series_have_the_color_and_the_style_they_ask_for():
  points = [(1, 1.0), (2, 2.0), (3, 4.0)]
  chart = line_chart([
    Series("a & b", points, "thin", color=5, hover=False), Series("mean", points, color=5), Series("held-out", points, "points"),
  ])  # fmt: skip
  thin, line = _of_class(chart, "curve")
  assert thin.get("class") == "curve s5 thin" and line.get("class") == "curve s5"
  assert "".join(thin.itertext()) == "a & b" and len(_of_class(chart, "s2")) == 3  # circles alone
  assert "a &amp; b: " not in chart and "mean: 2 at step 2" in chart
  assert not _of_class(line_chart([Series("a", points, hover=False)]), "band")
