"""Plots a run's bits per byte as an SVG:  python -m benchmarks.curve --workdir=runs/tiny --out=benchmarks/tiny.svg

--line adds a horizontal line for comparison, such as gzip's bits per byte.
"""

import html
import math
import os
from collections.abc import Sequence

from absl import flags

from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import parse, run_program
from deepseek_jax.training import metrics
from deepseek_jax.training.plot import HEIGHT, LEFT, WIDTH, Series, line_chart

COLORS = ("#4361ee", "#e8590c", "#9775fa", "#2b8a3e")  # of the first, second, ... series of a panel
STYLE = (
  "text{font:11px sans-serif;fill:#667085}.y{text-anchor:end}.x{text-anchor:middle}path{fill:none}.grid{stroke:#e4e7ec}"
  ".axis{stroke:#98a2b3}.curve{stroke-width:1.6}.band{fill-opacity:0}.title{font-weight:bold}"
) + "".join(f"path.s{i}{{stroke:{c}}}circle.s{i},tspan.s{i}{{fill:{c}}}" for i, c in enumerate(COLORS))
HEADING = 22  # pixels above a panel, for its title and legend


def main(argv: list[str]) -> int:
  values = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
  flags.DEFINE_string("out", None, "SVG file to write", flag_values=values)
  flags.DEFINE_string("name", "other", "label of --line", flag_values=values)
  flags.DEFINE_float("line", None, "bits per byte of another compressor", flag_values=values)
  parse(argv, values, __doc__)
  if not (values.workdir and values.out):
    raise ConfigError("--workdir=DIR of a run and --out=FILE.svg are required")
  lines = metrics.read_jsonl(os.path.join(values.workdir, metrics.METRICS))
  events = metrics.read_jsonl(os.path.join(values.workdir, metrics.EVENTS))
  if not lines:
    raise ConfigError(f"{values.workdir} has no metrics.jsonl: give the workdir of a training run")
  heldout = [(e["step"], e["bits_per_byte"]) for e in events if e["event"] == "eval"]
  series = [
    Series("training", [(line["step"], line["bits_per_byte"]) for line in lines]),
    Series("held-out", heldout, "dots"),
  ]
  if values.line:
    series.append(Series(values.name, [(lines[0]["step"], values.line), (lines[-1]["step"], values.line)]))
  write_svg(values.out, [("bits per byte over steps", series, "log")])
  return 0


def write_svg(
  file: str, panels: Sequence[tuple[str, Sequence[Series], str]], columns: int = 1, x_unit: str = "step"
) -> None:
  """Writes a standalone SVG of `panels`, each (title, series, scale), in rows of `columns`. x_unit: as `line_chart` has it."""
  elements = []
  for i, (title, series, scale) in enumerate(panels):
    x, y = i % columns * WIDTH, i // columns * (HEIGHT + HEADING)
    legend = "".join(f'<tspan class="s{j}" dx="12">{html.escape(s.name)}</tspan>' for j, s in enumerate(series))
    elements.append(
      f'<text x="{x + LEFT}" y="{y + 15}"><tspan class="title">{html.escape(title)}</tspan>{legend}</text>'
    )
    position = f'<svg x="{x}" y="{y + HEADING}" width="{WIDTH}" height="{HEIGHT}" '
    elements.append(line_chart(series, scale=scale, x_unit=x_unit).replace("<svg ", position, 1))
  width, height = columns * WIDTH, math.ceil(len(panels) / columns) * (HEIGHT + HEADING)
  page = f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
  with open(file, "w", encoding="utf-8") as f:
    f.write(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{page}{"".join(elements)}</svg>\n')


if __name__ == "__main__":
  run_program(main)
