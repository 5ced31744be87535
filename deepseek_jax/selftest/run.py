"""The self-test at the start of a run: which kernels fall back to XLA. The choice is saved in the run's folder.

A resume uses the saved choice, whatever a new measurement would give: another choice would round differently.
"""

import dataclasses
import json
import logging
import pathlib
from collections import Counter

from deepseek_jax.config import Config
from deepseek_jax.console import current_console
from deepseek_jax.data.cache import cache_root, read_json_dict, write_atomically
from deepseek_jax.errors import ConfigError
from deepseek_jax.model.kernel_choice import implementation_fields
from deepseek_jax.selftest.check import BROKEN, SLOW, Result
from deepseek_jax.selftest.child import read_results
from deepseek_jax.selftest.machine import accelerators, results_key, run_key
from deepseek_jax.selftest.supervise import ChildFailed, Report, run_selftest
from deepseek_jax.training.metrics import SELFTEST

TIME_LIMIT = 50  # seconds after which no further kernel is started, so that a start takes at most a minute longer
RETEST_HINT = "test again: python -m deepseek_jax.selftest --again, with the same --config"
RESULT_FIELDS = {field.name for field in dataclasses.fields(Result)}
_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Choice:
  """Which kernels of a run fall back to XLA. Fields are keys of the file SELFTEST.

  key: of the run, see `machine.run_key`. machine: as `describe_device` gives it.
  functions: "kernel.function", all calls of which fall back. calls: keys of single calls that do.
  known: calls that the choice is about, whether tested or not. results: of the cases, for the reader of the file.
  """

  key: str
  machine: dict[str, str]
  functions: list[str] = dataclasses.field(default_factory=list)
  calls: list[str] = dataclasses.field(default_factory=list)
  known: list[str] = dataclasses.field(default_factory=list)
  results: list[dict] = dataclasses.field(default_factory=list)


def results_folder(config: Config) -> pathlib.Path:
  """The folder of saved results, which all runs share: in the cache folder."""
  return cache_root(config.data) / "selftest"


def select_kernels(
  config: Config, folder: str, processes: int = 1, enabled: bool = True
) -> tuple[list[str], list[str]]:
  """(functions, calls) that fall back to XLA in the run in `folder`; tests kernels that were not tested before.

  This process opens no device.

  Args:
    config: its mesh may be unresolved. processes: of the run; this one, the first, decides for all.
    enabled: whether to test; a choice that the folder has is used in any case.

  Raises:
    ConfigError: a kernel that the config names fails.
  """
  chips, path = accelerators(), pathlib.Path(folder, SELFTEST)
  key, stored = run_key(config, chips, processes), _read_choice(path)
  if stored and (stored.key == key or not enabled):
    return stored.functions, stored.calls
  if not (chips and enabled and _uses_pallas(config)):
    return [], []
  report = _load_or_test(config, key, chips, processes)
  if not report.machine:  # the test could not run, and the run itself will show why
    return [], []
  choice = _choose(config, key, report, path)
  if stored and stored.machine["chip"] == choice.machine["chip"]:
    choice = _merge_choices(stored, choice)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(dataclasses.asdict(choice), indent=1))
  except OSError as error:
    raise ConfigError(f"cannot write {error.filename}: {error.strerror}; use another --workdir") from None
  return choice.functions, choice.calls


def _uses_pallas(config: Config) -> bool:
  return any(implementation != "xla" for _, implementation in implementation_fields(config.model).values())


def _load_or_test(config: Config, key: str, chips: list[str], processes: int) -> Report:
  """The report on the kernels of a run: from saved results, or from a test."""
  folder = results_folder(config)
  saved = read_json_dict(folder / f"run-{key}.json")
  if saved.get("format") == 1:
    results = read_results(str(folder), results_key(saved["machine"]))
    results = {
      name: fields for name, fields in results.items() if name in saved["cases"] and fields.keys() == RESULT_FIELDS
    }
    report = Report(saved["machine"], saved["cases"], {name: Result(**fields) for name, fields in results.items()})
    if report.complete:
      return report
  current_console().print("self-test  comparing kernels with XLA, once for these shapes, up to a minute")
  try:
    report = run_selftest(config, folder, chips, processes=processes, seconds=TIME_LIMIT)
  except ChildFailed as error:
    current_console().print(f"self-test  could not run, so kernels are used untested: {error}")
    return Report()
  if report.complete and not report.refused:
    try:
      write_atomically(
        folder / f"run-{key}.json", json.dumps({"format": 1, "machine": report.machine, "cases": report.cases})
      )
    except OSError as error:  # the next start tests again
      _log.warning("self-test: cannot write %s: %s", error.filename, error.strerror)
  return report


def _choose(config: Config, key: str, report: Report, path: pathlib.Path) -> Choice:
  """The choice by the verdicts, and a printed line for each kernel that did not pass.

  A kernel that failed at one shape falls back at all shapes, a slow one at that shape.
  """
  fields = implementation_fields(config.model)
  functions: set[str] = set()
  calls: set[str] = set()
  messages: dict[str, str] = {}
  for case, result in report.results.items():
    field, implementation = fields.get(result.kernel.partition(".")[0], ("", "auto"))
    if result.verdict not in (SLOW, *BROKEN):
      continue
    outcome = f"{result.kernel} {result.verdict} on {report.machine['chip']} ({result.message})"
    if implementation == "pallas" and result.verdict in BROKEN:
      raise ConfigError(f"{field}=pallas, but {outcome}: use auto, which falls back to XLA; {RETEST_HINT}")
    if implementation == "pallas":
      messages.setdefault(result.kernel, f"{outcome}: used nevertheless, since {field}=pallas; report: {path}")
    elif result.verdict == SLOW:
      calls.update(report.cases[case][1:])
      messages.setdefault(
        result.kernel, f"{outcome}: falling back to XLA for such shapes; report: {path}; {RETEST_HINT}"
      )
    else:
      functions.add(result.kernel)
      messages[result.kernel] = f"{outcome}: falling back to XLA; report: {path}; {RETEST_HINT}"
  for message in messages.values():
    current_console().print(f"self-test  {message}")
  current_console().print(f"self-test  {_summarize(report)}")
  known = sorted({call for names in report.cases.values() for call in names[1:]})
  results = [dataclasses.asdict(result) for result in report.results.values()]
  return Choice(key, report.machine, sorted(functions), sorted(calls), known, results)


def _summarize(report: Report) -> str:
  """How many cases have which verdict."""
  counts = Counter(result.verdict for result in report.results.values())
  missing = len(report.cases) - len(report.results)
  parts = [f"{count} {verdict}" for verdict, count in counts.items()]
  if missing:
    parts.append(f"{missing} not reached, used untested")
  reason = f" ({report.stopped})" if report.stopped else ""
  return f"{len(report.cases)} cases: {', '.join(parts) or 'no Pallas kernels for this config on this device'}{reason}"


def _merge_choices(stored: Choice, new: Choice) -> Choice:
  """The choice of a resume on the same chip: each call that the run has made before stays as it was.

  `new` decides for calls that the run did not make before, as on another mesh. Under other versions or kernels bits may
  differ in any case, so that kernels that fail now fall back too.
  """
  same_machine = results_key(stored.machine) == results_key(new.machine)
  known_functions = {call.partition("(")[0] for call in stored.known}
  functions = [name for name in new.functions if not same_machine or name not in known_functions]
  calls = [call for call in new.calls if call not in stored.known]
  known = sorted({*stored.known, *new.known})
  return dataclasses.replace(
    new, functions=sorted({*stored.functions, *functions}), calls=sorted({*stored.calls, *calls}), known=known
  )


def _read_choice(path: pathlib.Path) -> Choice | None:
  """The choice that is saved in the run's folder, or None."""
  if not path.exists():
    return None
  try:
    choice = Choice(**json.loads(path.read_bytes()))
    choice.machine["chip"]
  except (OSError, ValueError, TypeError, KeyError):
    current_console().print(
      f"self-test  {path} is damaged: kernels are tested again, and the resume may not be bitwise"
    )
    return None
  return choice
