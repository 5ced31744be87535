"""A comparison as one HTML page that needs no network, in the style of a run's report.

Every text of runs is escaped, and the page's content security policy forbids it to load or run anything.
"""

import html
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from deepseek_jax.compare import page_charts
from deepseek_jax.compare.groups import Group, format_value
from deepseek_jax.compare.text import (
  COST_COLUMNS,
  FINAL_COLUMNS,
  RESULT_COLUMNS,
  cost_row,
  count_runs,
  final_row,
  fixed,
  not_counted,
  result_row,
)
from deepseek_jax.config import Config
from deepseek_jax.console import printable
from deepseek_jax.schema import leaf_paths
from deepseek_jax.training.page import document, section

if TYPE_CHECKING:
  from deepseek_jax.compare.comparison import Comparison

TEXT_COLUMNS = {"group", "run", "end", "devices", "field"}  # the others hold numbers, to the right


def format_page(comparison: "Comparison") -> str:
  """The page."""
  parts = [
    f"<header><h1>{_heading(comparison)}</h1><p>{escape(count_runs(comparison))}</p></header>",
    _verdict(comparison),
    _groups(comparison),
    _charts(comparison),
    section("Final held-out evaluation", _finals(comparison)),
    section("What differs", _differences(comparison)),
    section("Runs", _runs(comparison)),
    section("Left out", _left_out(comparison)),
  ]
  style = pathlib.Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
  return document(count_runs(comparison), parts, style)


def escape(value: Any) -> str:
  """`value` as text for HTML, which control characters may not be in."""
  return html.escape(printable(str(value)))


def _heading(comparison: "Comparison") -> str:
  if comparison.verdict:
    a, b = (f"{_chip(group)} {escape(group.label)}" for group in (comparison.verdict.a, comparison.verdict.b))
    return f"{a} against {b}"
  return "Comparison of runs"


def _chip(group: Group) -> str:
  return f'<span class="chip {page_charts.color_class(group)}">{group.letter}</span>'


def _verdict(comparison: "Comparison") -> str:
  if not comparison.verdict:
    return ""
  outcome, *rest = comparison.verdict.lines()
  kind = "good" if " is better" in comparison.verdict.outcome else "open"
  items = "".join(f"<li>{escape(line)}</li>" for line in rest)
  return f'<section class="verdict {kind}"><h2>{escape(outcome)}</h2><ul>{items}</ul></section>'


def _groups(comparison: "Comparison") -> str:
  rows = []
  for group in comparison.groups:
    final, names = group.final(), ", ".join(run.name for run in group.runs)
    half = f" ± {final.high - final.mean:.4f}" if final and final.high is not None else ""
    rows.append(
      f"<li>{_chip(group)}<b>{escape(group.label)}</b><span>{escape(names)}</span>"
      f"<em>{fixed(final.mean if final else None)}{half}</em></li>"
    )
  head = "<p><span>group and its runs</span><em>held-out bits/byte</em></p>"
  return f'<section class="groups">{head}<ul>{"".join(rows)}</ul></section>'


def _charts(comparison: "Comparison") -> str:
  tabs = page_charts.tabs(comparison)
  note = (
    "Lines: training; thick ones are means over seeds. Dots: held-out evaluations. Time is of steps and of waiting for data; "
    "FLOPs are of matmuls with causal attention, as MFU counts them. Hover for numbers and names."
  )
  if len(comparison.runs) > page_charts.MAX_RUNS:
    note += f" Of more than {page_charts.MAX_RUNS} runs only the means over seeds are drawn."
  return f'{tabs}<p class="note">{note}</p>' if tabs else ""


def _finals(comparison: "Comparison") -> str:
  rows = [[_chip(group), *map(escape, final_row(group)[1:])] for group in comparison.groups]
  note = (
    "Means over seeds ± half of the 95% interval of the mean (Student's t); sd is the standard deviation between seeds. Loss in "
    "nats per token."
  )
  return f'{_table(FINAL_COLUMNS, rows)}<p class="note">{escape(note)}</p>'


def _differences(comparison: "Comparison") -> str:
  if len(comparison.groups) == 1:
    return ""
  if not comparison.differences:
    return "<p>No config field that has an effect.</p>"
  fields = leaf_paths(Config)
  head = "".join(f"<th>{_chip(group)}</th>" for group in comparison.groups)
  rows = []
  for row in comparison.differences:
    doc = fields[row.path].metadata["doc"] if row.path in fields else "no such field in this version"
    cells = "".join(f'<td title="{escape(value)}">{escape(format_value(value))}</td>' for value in row.values)
    rows.append(f'<tr><th title="{escape(doc)}">{_breakable(row.path)}</th>{cells}</tr>')
  table = f'<table class="fields"><thead><tr><th>field</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
  return (
    f'<div class="scroll whole">{table}</div><p class="note">–: without effect there. Hover for what a field means.</p>'
  )


def _breakable(path: str) -> str:
  """A field's path as HTML that may go on in the next line after a dot or an underscore."""
  return escape(path).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _runs(comparison: "Comparison") -> str:
  other = [metric for metric in comparison.metrics if metric not in ("bits_per_byte", "loss")]
  results, costs = [], []
  for group in comparison.groups:
    for run in group.runs:
      name = f'<span title="{escape(run.place)}">{escape(run.name)}</span>'
      last = (run.last_value(metric) for metric in other)
      values = [*result_row(group, run)[2:], *("–" if value is None else f"{value:.5g}" for value in last)]
      results.append([name, _chip(group), *map(escape, values)])
      costs.append([name, *map(escape, cost_row(run)[1:])])
  note = "best, step: the smallest held-out bits per byte, and after which step. train: the last logged loss. end: open, if none was recorded."
  tables = f'{_table((*RESULT_COLUMNS, *other), results)}<p class="note">{escape(note)}</p>'
  return f"{tables}<h2>What they took</h2>{_table(COST_COLUMNS, costs)}"


def _left_out(comparison: "Comparison") -> str:
  lines = [line for group in comparison.groups for line in not_counted(group)]
  lines += [f"{path}: {reason.removeprefix(f'{path}: ')}" for path, reason in comparison.passed_over]
  return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table of cells that are HTML already."""

  def cells(tag: str, row: Sequence[str]) -> Iterator[str]:
    for name, cell in zip(header, row, strict=True):
      yield f"<{tag}{'' if name in TEXT_COLUMNS else ' class=n'}>{cell}</{tag}>"

  head = "".join(cells("th", [escape(name) for name in header]))
  body = "".join(f"<tr>{''.join(cells('td', row))}</tr>" for row in rows)
  return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
