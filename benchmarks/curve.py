"""Draws a run's bits per byte as an SVG:  python -m benchmarks.curve --workdir=runs/tiny --out=benchmarks/tiny.svg

Blue: each training step. Orange: held-out. Violet: --line, a number to compare with, such as gzip's.
"""

import os

from absl import flags

from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import parse, run_program
from deepseek_jax.training import metrics
from deepseek_jax.training.plot import Series, line_chart

STYLE = (
  "text{font:11px sans-serif;fill:#667085}.y{text-anchor:end}.x{text-anchor:middle}path{fill:none}.grid{stroke:#e4e7ec}"
  ".axis{stroke:#98a2b3}.curve{stroke-width:1.6}path.s0{stroke:#4361ee}path.s1{stroke:#e8590c}path.s2{stroke:#9775fa}"
  "circle.s1{fill:#e8590c}.band{fill-opacity:0}"
)


def main(argv) -> int:
  values = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
  flags.DEFINE_string("out", None, "the SVG file to write", flag_values=values)
  flags.DEFINE_float("line", None, "bits per byte of another compressor", flag_values=values)
  parse(argv, values, __doc__)
  if not (values.workdir and values.out):
    raise ConfigError("--workdir=DIR names a run and --out=FILE.svg the picture")
  lines = metrics.read(os.path.join(values.workdir, metrics.METRICS))
  events = metrics.read(os.path.join(values.workdir, metrics.EVENTS))
  if not lines:
    raise ConfigError(f"{values.workdir} has no metrics.jsonl of a run")
  heldout = [(e["step"], e["bits_per_byte"]) for e in events if e["event"] == "eval"]
  series = [
    Series("train", [(line["step"], line["bits_per_byte"]) for line in lines]),
    Series("held-out", heldout, "dots"),
  ]
  if values.line:
    series.append(Series("other", [(lines[0]["step"], values.line), (lines[-1]["step"], values.line)]))
  chart = line_chart(series, scale="log").replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
  chart = chart.replace(">", f'><style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>', 1)
  with open(values.out, "w", encoding="utf-8") as f:
    f.write(chart + "\n")
  return 0


if __name__ == "__main__":
  run_program(main)
