"""Puts what `python -m benchmarks.gpu` measured into the docs and into tiles.json:  python -m benchmarks.gpu_report

Between the two comments of docs/results/kernels.md that hold the figures everything is replaced; the rest of the file stays. Steps that
have not run, or failed, are said. The tiles of --out are added to the table that the kernels read. --print shows the figures
and writes nothing.
"""

import collections
import math
import pathlib

from absl import flags

from benchmarks.gpu import DONE, TABLE, merge_tiles
from benchmarks.gpu_steps import PRECISIONS, STEPS, TRAINED
from benchmarks.results import read_json
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import parse, run_program

BEGIN, END = "<!-- gpu figures: begin -->", "<!-- gpu figures: end -->"
GIB = 2**30


def main(argv) -> int:
  values = flags.FlagValues()
  flags.DEFINE_string("out", "runs/gpu", "folder of the results", flag_values=values)
  flags.DEFINE_string("page", "docs/results/kernels.md", "file whose figures are replaced", flag_values=values)
  flags.DEFINE_string("table", str(TABLE), "tiles that are extended", flag_values=values)
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
  replace(pathlib.Path(values.page), text)
  merge_tiles(path.with_name("tiles.json"), pathlib.Path(values.table))
  print(f"figures of {record['machine']['chip']}: {values.page}; tiles: {values.table}")
  return 0


def replace(path, text):
  """Replaces what is between BEGIN and END. Raises ConfigError unless each is there once, in that order."""
  try:
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
  except (OSError, ValueError):
    raise ConfigError(
      f"{path} must have the line {BEGIN} once, and after it {END} once: add them where figures go"
    ) from None
  path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def report(record) -> str:
  """Markdown: machine, command and date, then a table of each kind that has rows."""
  steps = record["steps"]
  parts = [heading(record), selftests(steps), kernels(steps), attention(steps), trained(steps), missing(steps)]
  return "\n\n".join(part for part in parts if part)


def heading(record):
  machine, entries = record["machine"], record["steps"].values()
  commits = sorted({str(entry["commit"]) for entry in entries})
  dates = sorted({entry["date"][:10] for entry in entries})
  toy = "**A rehearsal at sizes of a test, not a measurement.** " if record["toy"] else ""
  return (
    f"{toy}`make gpu` on {machine['chip']}, driver {machine['driver'] or 'unknown'}, jax {machine['jax']}, at "
    f"{', '.join(commits)}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}. Random data; one run; best of three rounds of "
    "calls for kernels, medians of steps for training."
  )


def grid(columns, rows):
  """A Markdown table, or "" without rows."""
  if not rows:
    return ""
  lines = [columns, ["---"] * len(columns), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value, form="{:.4g}"):
  return "" if value is None or (isinstance(value, float) and math.isnan(value)) else form.format(value)


def selftests(steps):
  rows = []
  for name, result in results(steps, "selftest_"):
    found = result.get("results", [])
    verdicts = collections.Counter(str(r.get("verdict")) for r in found)
    shares = [r["error"] / r["bound"] for r in found if r.get("error") is not None and r.get("bound")]
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items())) or "nothing to test here"
    rows.append([name.removeprefix("selftest_"), counts, number(max(shares, default=None), "{:.2g}")])
  return grid(["self-test", "results", "largest error / bound"], rows)


def results(steps, prefix):
  """(name, result) of the steps that left one, in their order."""
  names = [step.name for step in STEPS if step.name.startswith(prefix) and step.name in steps]
  return [(name, steps[name]["result"]) for name in names if steps[name]["result"]]


def kernels(steps):
  """The rows of fp8_matmul, and beside them the rate with the tiles that were measured after."""
  tuned = {
    row.get("product"): row.get("rate") for _, result in results(steps, "tune_kernels") for row in result["rows"]
  }
  rows = []
  for _, result in results(steps, "fp8_matmul"):
    for row in result["rows"]:
      if "unit" in row:
        names = ("ours", "bf16", "torch", "goal", "floor")
        ours, *others = (number(row.get(name)) for name in names)
        rate = number(tuned.get(row["name"]) if row["unit"] == "TFLOP/s" else None)
        rows.append([row["name"], row["unit"], ours, rate, *others, number(row.get("error"), "{:.1e}")])
      else:
        rows.append([row["name"], row.get("failure", "cut off"), *[""] * 7])
  return grid(["FP8 kernel", "", "ours", "tiles measured", "bf16", "torch", "goal", "floor", "error"], rows)


def attention(steps):
  rows = []
  for _, result in results(steps, "attention"):
    for row in result["rows"]:
      if "unit" in row:
        numbers = (number(row.get(name)) for name in ("ours", "xla", "torch"))
        rows.append([row["name"], row["kernel"] or "", *numbers, number(row.get("error"), "{:.1e}")])
      else:
        rows.append([row["name"], row.get("failure", "cut off"), *[""] * 4])
  return grid(["attention, TFLOP/s", "kernel", "ours", "XLA", "torch", "error"], rows)


def trained(steps):
  """What was measured of each training, and after each number what `plan` had predicted."""
  rows = []
  for config in TRAINED:
    for precision in PRECISIONS:
      run, plan = ((steps.get(f"{kind}_{config}_{precision}") or {}).get("result") or {} for kind in ("train", "plan"))
      if not run and not plan:
        continue
      predicted = plan.get("step_seconds"), plan.get("mfu"), plan.get("hbm_bytes_per_device", {}).get("total")
      rows.append([
        f"`{config}`", precision,
        both(run.get("seconds"), predicted[0], "{:.3f}"), number(run.get("tokens_per_second"), "{:,.0f}"),
        both(run.get("mfu"), predicted[1], "{:.1%}"),
        both(gib(run.get("peak_bytes")), gib(predicted[2]), "{:.1f}"), number(run.get("compile_seconds"), "{:.0f}"),
        number((run.get("losses") or [None])[-1], "{:.3f}"),
      ])  # fmt: skip
  columns = ["training", "", "s a step (plan)", "tokens/s", "MFU (plan)", "peak GiB (plan)", "compile s", "last loss"]
  return grid(columns, rows)


def both(measured, predicted, form):
  return f"{number(measured, form) or 'none'} ({number(predicted, form) or 'none'})"


def gib(size):
  return None if size is None else size / GIB


def missing(steps):
  """The steps that are not done."""
  found = collections.defaultdict(list)
  for step in STEPS:
    entry = steps.get(step.name)
    status = "not run" if entry is None else entry["status"]
    if status != DONE:
      found[status].append(step.name + (f" (exit code {entry['exit_code']})" if status == "failed" else ""))
  return "\n".join(f"{status.capitalize()}: {', '.join(names)}." for status, names in found.items())


if __name__ == "__main__":
  run_program(main)
