"""The self-test at the start of a run: which kernels XLA's forms replace. The answer stays in the run's folder.

A resume takes that answer, whatever a new measurement would give: another choice would round differently.
"""

import dataclasses
import json
import pathlib

from deepseek_jax.config import Config
from deepseek_jax.data.cache import root, write_atomically
from deepseek_jax.errors import ConfigError
from deepseek_jax.model.transformer import implementation_fields
from deepseek_jax.selftest.check import BROKEN, OK, SLOW, Result
from deepseek_jax.selftest.machine import accelerators, results_key, run_key
from deepseek_jax.selftest.supervise import ChildFailed, Report, run_selftest

FILE = "selftest.json"
SECONDS = 50  # after which no further kernel is begun at the start of a run, so that it costs a minute


def results_folder(config: Config) -> pathlib.Path:
  """Where results are kept for all runs: in the cache folder."""
  return root(config.data) / "selftest"


def select_kernels(
  config: Config, folder: str, processes: int = 1, enabled: bool = True
) -> tuple[list[str], list[str]]:
  """(functions, calls) of the Replacements of the run in `folder`; tests what was not tested before. No device is opened by this process.

  Args:
    config: its mesh may be open. processes: of the run; this one, the first, decides for all.
    enabled: whether to test; a choice that the folder has holds in any case.

  Raises:
    ConfigError: a kernel that the config names fails.
  """
  chips, path = accelerators(), pathlib.Path(folder, FILE)
  key, stored = run_key(config, chips, processes), _read(path)
  if stored and (stored["key"] == key or not enabled):
    report = _report(stored)
  elif chips and enabled and _pallas_allowed(config):
    report = _tested(config, key, processes)
    if not report.cases:
      return [], []
    if stored and results_key(stored["machine"]) == results_key(report.machine):
      report.cases |= stored["cases"]
      report.results |= _report(stored).results
    _write(path, key, report)
  else:
    return [], []
  return _replacements(config, report, path)


def _pallas_allowed(config: Config) -> bool:
  return any(implementation != "xla" for _, implementation in implementation_fields(config.model).values())


def _tested(config, key, processes) -> Report:
  """The report of a test that an earlier run made of the same, or of one that is made now."""
  folder = results_folder(config)
  kept = folder / f"run-{key}.json"
  if found := _read(kept):
    return _report(found)
  print("self-test  kernels beside XLA's forms, once for these shapes, up to a minute", flush=True)
  try:
    report = run_selftest(config, folder, processes=processes, seconds=SECONDS)
  except ChildFailed as error:
    print(f"self-test  could not run, so kernels are used untested: {error}", flush=True)
    return Report()
  if report.cases and len(report.results) == len(report.cases):
    _write(kept, key, report)
  return report


def _replacements(config, report, path) -> tuple[list[str], list[str]]:
  """By the verdicts: a kernel that failed at one shape is used for none, a slow one not for that shape. One line for each."""
  fields, functions, calls, told = implementation_fields(config.model), set(), set(), {}
  for key, result in report.results.items():
    field, implementation = fields.get(result.kernel.partition(".")[0], ("", "xla"))
    if implementation == "xla" or result.verdict not in (SLOW, *BROKEN):
      continue
    what = f"{result.kernel} {result.verdict} on {report.machine['chip']} ({result.message})"
    if implementation == "pallas" and result.verdict in BROKEN:
      raise ConfigError(f"{field}=pallas, but {what}: use auto, which falls back to XLA; report: {path}")
    if implementation == "pallas":
      told.setdefault(result.kernel, f"{what}: kept, since {field}=pallas; report: {path}")
    elif result.verdict == SLOW:
      calls.update(report.cases[key][1:])
      told.setdefault(result.kernel, f"{what}: falling back to XLA for such shapes; report: {path}")
    else:
      functions.add(result.kernel)
      told[result.kernel] = told.get(result.kernel) or f"{what}: falling back to XLA; report: {path}"
  for line in told.values():
    print(f"self-test  {line}")
  tested = [result for result in report.results.values() if result.verdict == OK]
  print(f"self-test  {len(tested)} of {len(report.cases)} kernels pass at their shapes", flush=True)
  return sorted(functions), sorted(calls)


def _read(path: pathlib.Path) -> dict | None:
  """What `_write` wrote; None where there is none, or it is damaged."""
  try:
    found = json.loads(path.read_bytes())
    return found if {"key", "machine", "cases", "results"} <= set(found) else None
  except (OSError, ValueError, TypeError):
    return None


def _report(stored: dict) -> Report:
  return Report(
    stored["machine"], stored["cases"], {key: Result(**fields) for key, fields in stored["results"].items()}
  )


def _write(path: pathlib.Path, key: str, report: Report):
  results = {name: dataclasses.asdict(result) for name, result in report.results.items()}
  content = {"key": key, "machine": report.machine, "cases": report.cases, "results": results}
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1))
  except OSError as error:
    raise ConfigError(f"cannot write {error.filename}: {error.strerror}; use another folder") from None
