"""A report for people."""

from deepseek_jax.selftest.check import OK, Result
from deepseek_jax.selftest.supervise import Report

COLUMNS = f"{'kernel':28}{'error':>9}{'bound':>9}{'ms':>10}{'rate':>18}{'XLA ms':>10}  {'verdict':13}shape"


def header(report: Report) -> str:
  m = report.machine
  return f"{m['chip']} ({m['driver']}), {m['packages']}, kernels {m['kernels']}\n{COLUMNS}"


def row(result: Result) -> str:
  def number(value, scale=1.0, form=".3g"):
    return "" if value is None else f"{value * scale:{form}}"

  rate = "" if result.rate is None else f"{result.rate:.4g} {result.unit}"
  notes = ["a slice"] * result.sliced + [f"for {result.calls} shapes"] * (result.calls > 1)
  shape = result.shape + (f"  ({', '.join(notes)})" if notes else "")
  line = (
    f"{result.kernel:28}{number(result.error):>9}{number(result.bound):>9}{number(result.seconds, 1e3, '.4g'):>10}{rate:>18}"
    f"{number(result.xla_seconds, 1e3, '.4g'):>10}  {result.verdict:13}{shape}"
  )
  return f"{line}\n  {result.message}" if result.message else line


def summary(report: Report) -> str:
  if not report.cases:
    return f"{report.machine['chip']} has no kernels for this config: XLA's forms run, and there is nothing to test"
  passed = sum(result.verdict == OK for result in report.results.values())
  missing = len(report.cases) - len(report.results)
  rest = f"; {missing} not reached, which the same command goes on with" if missing else ""
  return f"{passed} of {len(report.results)} pass{rest}{f': {report.stopped}' if report.stopped else ''}"
