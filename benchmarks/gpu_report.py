"""Writes the results of `python -m benchmarks.gpu` into the docs and into tiles.json:  python -m benchmarks.gpu_report

Replaces what is between the two marker comments of docs/results/kernels.md. Steps that have not run, or failed, are
listed. The tiles of --out are added to those that the kernels use. --print shows the report and writes nothing.
"""

import collections
import math
import pathlib
from typing import Any

from absl import flags

from benchmarks.gpu import DONE, TILES_FILE, merge_tiles
from benchmarks.gpu_steps import PRECISIONS, STEPS, TRAINED_CONFIGS
from benchmarks.results import read_json
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import parse, run_program

BEGIN_MARKER, END_MARKER = "<!-- gpu figures: begin -->", "<!-- gpu figures: end -->"
GIB = 2**30
Steps = dict[str, dict[str, Any]]  # {name: entry of gpu.json}


def main(argv: list[str]) -> int:
  values = flags.FlagValues()
  flags.DEFINE_string("out", "runs/gpu", "folder of the results", flag_values=values)
  flags.DEFINE_string("page", "docs/results/kernels.md", "file whose results are replaced", flag_values=values)
  flags.DEFINE_string("table", str(TILES_FILE), "file of tiles to extend", flag_values=values)
  flags.DEFINE_bool("print", False, "write nothing", flag_values=values)
  parse(argv, values, __doc__)
  path = pathlib.Path(values.out) / "gpu.json"
  record = read_json(path)
  if record is None:
    raise ConfigError(f"there is no {path}: run python -m benchmarks.gpu --part=1 first, or give its --out")
  text = report(record)
  if values.print:
    print(text)
    return 0
  write_between_markers(pathlib.Path(values.page), text)
  merge_tiles(path.with_name("tiles.json"), pathlib.Path(values.table))
  print(f"results of {record['machine']['chip']}: {values.page}; tiles: {values.table}")
  return 0


def write_between_markers(path: pathlib.Path, text: str) -> None:
  """Replaces what is between the markers of a file.

  Raises:
    ConfigError: the file does not have each marker once, in order.
  """
  try:
    before, rest = path.read_text(encoding="utf-8").split(BEGIN_MARKER)
    _, after = rest.split(END_MARKER)
  except (OSError, ValueError):
    raise ConfigError(
      f"{path} must have the line {BEGIN_MARKER} once, and after it {END_MARKER} once: add them where the results go"
    ) from None
  path.write_text(f"{before}{BEGIN_MARKER}\n{text}\n{END_MARKER}{after}", encoding="utf-8")


def report(record: dict[str, Any]) -> str:
  """Markdown: machine, command and date, then the tables that have rows. `record`: content of gpu.json."""
  steps = record["steps"]
  sections = [
    heading(record), selftest_table(steps), fp8_table(steps), attention_table(steps), training_table(steps),
    unfinished_steps(steps),
  ]  # fmt: skip
  return "\n\n".join(section for section in sections if section)


def heading(record: dict[str, Any]) -> str:
  """Command, machine, versions, commits and dates."""
  machine, entries = record["machine"], record["steps"].values()
  commits = sorted({str(entry["commit"]) for entry in entries})
  dates = sorted({entry["date"][:10] for entry in entries})
  toy = "**A rehearsal at sizes of a test, not a measurement.** " if record["toy"] else ""
  return (
    f"{toy}`make gpu` on {machine['chip']}, driver {machine['driver'] or 'unknown'}, jax {machine['jax']}, at "
    f"{', '.join(commits)}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}. Random data; one run; best of three rounds of "
    "calls for kernels, medians of steps for training."
  )


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
  """A Markdown table, or "" without rows."""
  if not rows:
    return ""
  lines = [columns, ["---"] * len(columns), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_number(value: float | None, form: str = "{:.4g}") -> str:
  """A number by a format string; "" for None and NaN."""
  return "" if value is None or (isinstance(value, float) and math.isnan(value)) else form.format(value)


def selftest_table(steps: Steps) -> str:
  """Verdicts of each self-test, and its largest error relative to the bound."""
  rows = []
  for name, result in results_of(steps, "selftest_"):
    cases = result.get("results", [])
    verdicts = collections.Counter(str(r.get("verdict")) for r in cases)
    error_ratios = [r["error"] / r["bound"] for r in cases if r.get("error") is not None and r.get("bound")]
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items())) or "nothing to test here"
    rows.append([name.removeprefix("selftest_"), counts, format_number(max(error_ratios, default=None), "{:.2g}")])
  return markdown_table(["self-test", "results", "largest error / bound"], rows)


def results_of(steps: Steps, prefix: str) -> list[tuple[str, dict[str, Any]]]:
  """(name, result) of the steps that have one and whose name starts with `prefix`, in the order of STEPS."""
  names = [step.name for step in STEPS if step.name.startswith(prefix) and step.name in steps]
  return [(name, steps[name]["result"]) for name in names if steps[name]["result"]]


def fp8_table(steps: Steps) -> str:
  """The rows of fp8_matmul, with the rate of the tiles that tune_kernels found."""
  tuned = {
    row.get("product"): row.get("rate") for _, result in results_of(steps, "tune_kernels") for row in result["rows"]
  }
  rows = []
  for _, result in results_of(steps, "fp8_matmul"):
    for row in result["rows"]:
      if "unit" in row:
        names = ("ours", "bf16", "torch", "goal", "floor")
        ours, *others = (format_number(row.get(name)) for name in names)
        rate = format_number(tuned.get(row["name"]) if row["unit"] == "TFLOP/s" else None)
        rows.append([row["name"], row["unit"], ours, rate, *others, format_number(row.get("error"), "{:.1e}")])
      else:
        rows.append([row["name"], row.get("failure", "cut off"), *[""] * 7])
  return markdown_table(["FP8 kernel", "", "ours", "tiles measured", "bf16", "torch", "goal", "floor", "error"], rows)


def attention_table(steps: Steps) -> str:
  """The rows of the attention benchmark."""
  rows = []
  for _, result in results_of(steps, "attention"):
    for row in result["rows"]:
      if "unit" in row:
        numbers = (format_number(row.get(name)) for name in ("ours", "xla", "torch"))
        rows.append([row["name"], row["kernel"] or "", *numbers, format_number(row.get("error"), "{:.1e}")])
      else:
        rows.append([row["name"], row.get("failure", "cut off"), *[""] * 4])
  return markdown_table(["attention, TFLOP/s", "kernel", "ours", "XLA", "torch", "error"], rows)


def training_table(steps: Steps) -> str:
  """Measured training steps, and after each number what `deepseek_jax.plan` predicts, in parentheses."""
  rows = []
  for config in TRAINED_CONFIGS:
    for precision in PRECISIONS:
      run, plan = ((steps.get(f"{kind}_{config}_{precision}") or {}).get("result") or {} for kind in ("train", "plan"))
      if not run and not plan:
        continue
      planned = plan.get("step_seconds"), plan.get("mfu"), plan.get("hbm_bytes_per_device", {}).get("total")
      rows.append([
        f"`{config}`", precision,
        measured_and_planned(run.get("seconds"), planned[0], "{:.3f}"),
        format_number(run.get("tokens_per_second"), "{:,.0f}"),
        measured_and_planned(run.get("mfu"), planned[1], "{:.1%}"),
        measured_and_planned(gib(run.get("peak_bytes")), gib(planned[2]), "{:.1f}"),
        format_number(run.get("compile_seconds"), "{:.0f}"),
        format_number((run.get("losses") or [None])[-1], "{:.3f}"),
      ])  # fmt: skip
  columns = ["training", "", "s/step (plan)", "tokens/s", "MFU (plan)", "peak GiB (plan)", "compile s", "last loss"]
  return markdown_table(columns, rows)


def measured_and_planned(measured: float | None, planned: float | None, form: str) -> str:
  """Both numbers as text, the second in parentheses."""
  return f"{format_number(measured, form) or 'none'} ({format_number(planned, form) or 'none'})"


def gib(size: float | None) -> float | None:
  """Bytes in GiB."""
  return None if size is None else size / GIB


def unfinished_steps(steps: Steps) -> str:
  """The steps that are not done, a line for each status."""
  names_by_status = collections.defaultdict(list)
  for step in STEPS:
    entry = steps.get(step.name)
    status = "not run" if entry is None else entry["status"]
    if status != DONE:
      names_by_status[status].append(step.name + (f" (exit code {entry['exit_code']})" if status == "failed" else ""))
  return "\n".join(f"{status.capitalize()}: {', '.join(names)}." for status, names in names_by_status.items())


if __name__ == "__main__":
  run_program(main)
