"""A comparison as text for a terminal: plain, in tables that are cut into blocks of columns where they are too wide."""

import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deepseek_jax.compare.groups import Group, format_value
from deepseek_jax.compare.intervals import Estimate
from deepseek_jax.compare.runs import ComparedRun, Numbers
from deepseek_jax.console import format_duration
from deepseek_jax.training.plot import format_compact

if TYPE_CHECKING:
  from deepseek_jax.compare.comparison import Comparison

SPARK_BINS = 40
BARS = "▁▂▃▄▅▆▇█"
X_TITLES = {"steps": "steps", "tokens": "tokens", "flops": "FLOPs", "seconds": "seconds"}
METRIC_TITLES = {"bits_per_byte": "bits per byte", "loss": "loss, nats per token"}


def format_comparison(comparison: "Comparison", width: int) -> str:
  """All of it, in sections."""
  sections = [
    ("Verdict", _verdict(comparison, width)),
    ("Groups", _groups(comparison, width)),
    ("What differs", _differences(comparison, width)),
    ("Final held-out evaluation: mean over seeds, 95% interval, standard deviation", _finals(comparison, width)),
    (_curves_title(comparison), _curves(comparison, width)),
    ("Runs", format_table(RESULT_COLUMNS, [result_row(g, run) for g, run in _runs(comparison)], width)),
    ("", format_table(COST_COLUMNS, [cost_row(run) for run in comparison.runs], width)),
    ("Last logged", _other_metrics(comparison, width)),
    ("Not counted", [line for group in comparison.groups for line in not_counted(group)]),
  ]
  blocks = ["\n".join([title, *lines] if title else lines) for title, lines in sections if lines]
  return "\n\n".join([count_runs(comparison), *blocks])


FINAL_COLUMNS = ("group", "seeds", "bits/byte", "sd", "loss", "sd", "tokens", "FLOPs")
RESULT_COLUMNS = ("run", "group", "seed", "bits/byte", "loss", "train", "best", "step", "skipped", "end")
COST_COLUMNS = ("run", "parameters", "steps", "tokens", "FLOPs", "time", "tokens/s", "devices")


def final_row(group: Group) -> list[str]:
  """Cells of FINAL_COLUMNS."""
  bits, loss, tokens, flops = (group.final(name) for name in ("bits_per_byte", "loss", "tokens", "flops"))
  return [
    group.letter, str(bits.n if bits else 0), format_estimate(bits), fixed(bits.sd if bits else None),
    format_estimate(loss), fixed(loss.sd if loss else None), compact(tokens.mean if tokens else None),
    exponent(flops.mean if flops else None),
  ]  # fmt: skip


def result_row(group: Group, run: ComparedRun) -> list[str]:
  """Cells of RESULT_COLUMNS."""
  n = run.numbers
  return [
    run.name, group.letter, str(run.seed), fixed(n.bits_per_byte), fixed(n.loss), fixed(n.train_loss),
    fixed(n.best_bits_per_byte), whole(n.best_step), whole(n.skipped), n.end or "open",
  ]  # fmt: skip


def cost_row(run: ComparedRun) -> list[str]:
  """Cells of COST_COLUMNS."""
  n = run.numbers
  return [
    run.name, whole(n.parameters), whole(n.steps), compact(n.tokens), exponent(n.flops), duration(n),
    compact(n.tokens_per_second), n.devices or "–",
  ]  # fmt: skip


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
  """Lines of a table whose first column is to the left, and stands before each block of the columns that fit."""
  columns = [[str(row[i]) for row in [header, *rows]] for i in range(len(header))]
  sizes = [max(map(len, column)) for column in columns]
  lines: list[str] = []
  start = 1
  while start < len(columns):
    end, used = start, sizes[0]
    while end < len(columns) and (end == start or used + 2 + sizes[end] <= width):
      used += 2 + sizes[end]
      end += 1
    for row in range(len(rows) + 1):
      cells = [columns[0][row].ljust(sizes[0]), *(columns[i][row].rjust(sizes[i]) for i in range(start, end))]
      lines.append("  ".join(cells).rstrip())
    lines.append("")
    start = end
  return lines[:-1]


def sparkline_values(comparison: "Comparison") -> dict[str, dict[str, Any]]:
  """{letter of a group: its mean curve of the first metric, as the means of equal parts of the x axis that all share}.

  Each is {"metric", "low", "high", "values"}: low and high bound the x axis; a value is None where a part has none.
  """
  metric = comparison.metrics[0]
  curves = {group.letter: group.mean_curve(metric, comparison.x_axis) for group in comparison.groups}
  high = max((float(curve.x[-1]) for curve in curves.values() if len(curve)), default=0.0)
  result: dict[str, dict[str, Any]] = {}
  for name, curve in curves.items():
    bins = np.minimum((curve.x / (high or 1) * SPARK_BINS).astype(int), SPARK_BINS - 1)
    centers = (np.arange(SPARK_BINS) + 0.5) / SPARK_BINS * high
    between = np.interp(centers, curve.x, curve.y, np.nan, np.nan) if len(curve) else np.full(SPARK_BINS, np.nan)
    means = [np.mean(curve.y[bins == i]) if np.any(bins == i) else between[i] for i in range(SPARK_BINS)]
    values = [float(mean) if np.isfinite(mean) else None for mean in means]
    result[name] = {"metric": metric, "low": 0.0, "high": high, "values": values}
  return result


def sparkline(values: Sequence[float | None], low: float, high: float) -> str:
  """A bar for each value between `low` and `high`, on a log scale where both are above 0; a space for None."""
  scale = math.log if low > 0 else lambda value: value
  span = scale(high) - scale(low) or 1
  return "".join(
    " " if value is None else BARS[round((scale(value) - scale(low)) / span * (len(BARS) - 1))] for value in values
  )


def format_estimate(estimate: Estimate | None) -> str:
  """Mean ± half its 95% interval, or the mean alone."""
  if estimate is None:
    return "–"
  half = "" if estimate.high is None else f" ± {estimate.high - estimate.mean:.4f}"
  return f"{estimate.mean:.4f}{half}"


def fixed(value: float | None) -> str:
  """Four decimals."""
  return "–" if value is None else f"{value:.4f}"


def whole(value: int | None) -> str:
  """With separators."""
  return "–" if value is None else f"{value:,}"


def compact(value: float | None) -> str:
  """Three significant digits with a unit."""
  return "–" if value is None else format_compact(float(f"{value:.3g}"))


def exponent(value: float | None) -> str:
  """Three significant digits as 1.23e+15."""
  return "–" if value is None else f"{value:.3g}"


def duration(numbers: Numbers) -> str:
  """Seconds of training as h:mm:ss."""
  return "–" if numbers.seconds is None else format_duration(numbers.seconds)


def not_counted(group: Group) -> list[str]:
  """A sentence for each run whose last evaluation is not in the mean."""
  return [f"{name} of {group.letter}: it {reason}" for name, reason in group.not_counted.items()]


def count_runs(comparison: "Comparison") -> str:
  """ "7 runs in 3 groups of seeds"."""
  runs, groups = len(comparison.runs), len(comparison.groups)
  return f"{runs} {'run' if runs == 1 else 'runs'} in {groups} {'group' if groups == 1 else 'groups'} of seeds"


def _runs(comparison: "Comparison") -> Iterator[tuple[Group, ComparedRun]]:
  return ((group, run) for group in comparison.groups for run in group.runs)


def _verdict(comparison: "Comparison", width: int) -> list[str]:
  if not comparison.verdict:
    return []
  outcome, *rest = comparison.verdict.lines()
  lines = [f"  {outcome}"]
  for line in rest:
    lines += textwrap.wrap(line, width, initial_indent="  ", subsequent_indent="    ")
  return lines


def _differences(comparison: "Comparison", width: int) -> list[str]:
  if len(comparison.groups) == 1:
    return []
  if not comparison.differences:
    return ["no config field that has an effect"]
  header = ["field", *(group.letter for group in comparison.groups)]
  rows = [[row.path, *map(format_value, row.values)] for row in comparison.differences]
  return format_table(header, rows, width)


def _groups(comparison: "Comparison", width: int) -> list[str]:
  lines = []
  for group in comparison.groups:
    names = ", ".join(run.name for run in group.runs)
    text = f"{group.letter}  {group.label}" + (f": {names}" if names != group.label else "")
    lines += textwrap.wrap(text, width, subsequent_indent="   ", break_on_hyphens=False)
  return lines


def _finals(comparison: "Comparison", width: int) -> list[str]:
  return format_table(FINAL_COLUMNS, [final_row(group) for group in comparison.groups], width)


def _curves_title(comparison: "Comparison") -> str:
  metric = comparison.metrics[0]
  return f"Training curves: {METRIC_TITLES.get(metric, metric)} over {X_TITLES[comparison.x_axis]}"


def _curves(comparison: "Comparison", width: int) -> list[str]:
  curves = sparkline_values(comparison)
  known = [value for curve in curves.values() for value in curve["values"] if value is not None]
  if not known:
    return ["none was logged over this axis"]
  lines = []
  letters = max(map(len, curves))
  for name, curve in curves.items():
    own = [value for value in curve["values"] if value is not None]
    ends = f"{own[0]:.4g} to {own[-1]:.4g}" if own else "not logged"
    lines.append(f"{name:{letters}}  {sparkline(curve['values'], min(known), max(known))}  {ends}")
  end = f"{compact(next(iter(curves.values()))['high'])} {X_TITLES[comparison.x_axis]}"
  return [*lines, f"{'':{letters}}  0{end:>{SPARK_BINS - 1}}"]


def _other_metrics(comparison: "Comparison", width: int) -> list[str]:
  other = [metric for metric in comparison.metrics if metric not in METRIC_TITLES]
  if not other:
    return []
  rows = []
  for group, run in _runs(comparison):
    values = [run.last_value(metric) for metric in other]
    rows.append([run.name, group.letter, *("–" if value is None else f"{value:.5g}" for value in values)])
  return format_table(("run", "", *other), rows, width)
