"""A self-test's report as a table of text."""

from deepseek_jax.selftest.check import OK, Result
from deepseek_jax.selftest.supervise import Report

COLUMNS = f"{'kernel':28}{'error':>9}{'bound':>9}{'ms':>10}{'rate':>18}{'XLA ms':>10}  {'verdict':13}shape"


def header(report: Report) -> str:
  """The machine, and the names of the columns."""
  machine = report.machine
  return f"{machine['chip']} ({machine['driver']}), {machine['packages']}, kernels {machine['kernels']}\n{COLUMNS}"


def row(result: Result) -> str:
  """A line for `result`, and a second one for its message."""

  def number(value, scale=1.0, format_spec=".3g"):
    return "" if value is None else f"{value * scale:{format_spec}}"

  rate = "" if result.rate is None else f"{result.rate:.4g} {result.unit}"
  notes = []
  if result.sliced:
    notes.append("a slice")
  if result.calls > 1:
    notes.append(f"for {result.calls} shapes")
  shape = result.shape + (f"  ({', '.join(notes)})" if notes else "")
  line = (
    f"{result.kernel:28}{number(result.error):>9}{number(result.bound):>9}{number(result.seconds, 1e3, '.4g'):>10}{rate:>18}"
    f"{number(result.xla_seconds, 1e3, '.4g'):>10}  {result.verdict:13}{shape}"
  )
  return f"{line}\n  {result.message}" if result.message else line


def summary(report: Report) -> str:
  """The last line: how many cases passed, and what is left."""
  if not report.cases:
    return f"{report.machine['chip']} has no kernels for this config: XLA's implementations run, and there is nothing to test"
  passed = sum(result.verdict == OK for result in report.results.values())
  missing = len(report.cases) - len(report.results)
  text = f"{passed} of {len(report.results)} pass"
  if missing:
    text += f"; {missing} not reached: the same command continues with them"
  return f"{text}: {report.stopped}" if report.stopped else text
