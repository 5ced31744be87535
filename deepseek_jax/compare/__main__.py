"""Compares runs:  python -m deepseek_jax.compare RUN RUN ... --flag=value ...

  python -m deepseek_jax.compare runs                                       all runs in a folder
  python -m deepseek_jax.compare runs/a runs/b --x=tokens --out=compare.html
  python -m deepseek_jax.compare --verdict 'runs/muon-*' 'runs/adamw-*'      is one better than the other?
  python -m deepseek_jax.compare gs://BUCKET/runs --json=-

RUN is the folder of a run, a folder that holds runs, a glob of these, or their URL. Runs that differ in the seed alone are
a group: results are means over seeds with their 95% interval. A run that cannot be read is named on stderr and passed
over. A run may go on meanwhile.
"""

import os
import shutil
import sys

from absl import flags

from deepseek_jax.console import printable
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import parse_positional, run_program
from deepseek_jax.json_output import show_result


def main(argv: list[str]) -> int:
  """Shows the comparison. Raises UserError where there is none."""
  values = flags.FlagValues()
  flags.DEFINE_string("x", "steps", "what curves are over: steps, tokens, flops or seconds", flag_values=values)
  flags.DEFINE_list(
    "metric", ["bits_per_byte", "loss"], "metrics of metrics.jsonl whose curves are shown, with commas between; held-out "
    "evaluations join those that they have", flag_values=values,
  )  # fmt: skip
  flags.DEFINE_string("out", None, "write the page, FILE.html, with curves over all axes", flag_values=values)
  flags.DEFINE_string(
    "json", None, "write the comparison to this file; - for stdout, and nothing else", flag_values=values
  )
  flags.DEFINE_boolean(
    "verdict", False, "say which of two groups is better; each of the two RUNs is a run, a folder of seeds or a quoted glob",
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_float(
    "smallest", 0.0025, "the smallest relative difference in bits per byte that matters to --verdict; the default is "
    "what DeepSeek-V3's report allows FP8", flag_values=values,
  )  # fmt: skip
  _, runs = parse_positional(argv, values, __doc__)
  if not runs:
    raise ConfigError("name the folders of runs, as python -m deepseek_jax.compare runs/a runs/b (see --help)")
  if values.out and not values.out.endswith(".html"):
    raise ConfigError(
      f"--out={values.out} must end in .html: the page is written there; --json=FILE writes the numbers"
    )

  from deepseek_jax.compare import compare_runs

  comparison = compare_runs(runs, values.x, values.metric, values.verdict, values.smallest)
  for path, reason in comparison.passed_over:
    print(printable(f"passed over {path}: {reason.removeprefix(f'{path}: ')}"), file=sys.stderr)
  text = comparison.text(shutil.get_terminal_size().columns if sys.stdout.isatty() else 80)
  if values.out:
    comparison.save(values.out)
    if values.json != "-":
      text += f"\n\nwrote    {os.path.abspath(values.out)}"
  else:
    text += "\n\n--out=FILE.html writes the page with the charts"
  return show_result(text, comparison.to_json(), values.json)


if __name__ == "__main__":
  run_program(main)
