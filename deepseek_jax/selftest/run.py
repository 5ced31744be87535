"""The self-test at the start of a run: which kernels XLA's forms replace. The choice stays in the run's folder.

A resume takes that choice, whatever a new measurement would give: another one would round differently.
"""

import dataclasses
import json
import logging
import pathlib
from collections import Counter

from deepseek_jax.config import Config
from deepseek_jax.data.cache import cache_root, read_json_dict, write_atomically
from deepseek_jax.errors import ConfigError
from deepseek_jax.model.kernel_choice import implementation_fields
from deepseek_jax.selftest.check import BROKEN, SLOW, Result
from deepseek_jax.selftest.child import read_results
from deepseek_jax.selftest.machine import accelerators, results_key, run_key
from deepseek_jax.selftest.supervise import ChildFailed, Report, run_selftest
from deepseek_jax.training.metrics import SELFTEST

SECONDS = 50  # after which no further kernel is begun: with what is then under way a start costs at most a minute
AGAIN = "test again: python -m deepseek_jax.selftest --again, with the same --config"
FIELDS = {field.name for field in dataclasses.fields(Result)}
_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Choice:
  """What XLA's forms replace in a run: of `functions` any call, and `calls`; JSON of SELFTEST.

  key: of the run, see `machine.run_key`. machine: what was tested. known: calls that were decided on, whether tested or not.
  results: for people.
  """

  key: str
  machine: dict[str, str]
  functions: list[str] = dataclasses.field(default_factory=list)
  calls: list[str] = dataclasses.field(default_factory=list)
  known: list[str] = dataclasses.field(default_factory=list)
  results: list[dict] = dataclasses.field(default_factory=list)


def results_folder(config: Config) -> pathlib.Path:
  """Where results are kept for all runs: in the cache folder."""
  return cache_root(config.data) / "selftest"


def select_kernels(
  config: Config, folder: str, processes: int = 1, enabled: bool = True
) -> tuple[list[str], list[str]]:
  """(functions, calls) that XLA's forms replace in the run in `folder`; tests kernels that were not tested before.

  No device is opened by this process.

  Args:
    config: its mesh may be open. processes: of the run; this one, the first, decides for all.
    enabled: whether to test; a choice that the folder has holds in any case.

  Raises:
    ConfigError: a kernel that the config names fails.
  """
  chips, path = accelerators(), pathlib.Path(folder, SELFTEST)
  key, stored = run_key(config, chips, processes), _read_choice(path)
  if stored and (stored.key == key or not enabled):
    return stored.functions, stored.calls
  if not (chips and enabled and _takes_kernels(config)):
    return [], []
  report = _tested(config, key, processes)
  if not report.machine:  # the run is to find out what is wrong
    return [], []
  choice = _choose(config, key, report, path)
  if stored and stored.machine["chip"] == choice.machine["chip"]:
    choice = _continued(stored, choice)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(dataclasses.asdict(choice), indent=1))
  except OSError as error:
    raise ConfigError(f"cannot write {error.filename}: {error.strerror}; use another --workdir") from None
  return choice.functions, choice.calls


def _takes_kernels(config: Config) -> bool:
  return any(implementation != "xla" for _, implementation in implementation_fields(config.model).values())


def _tested(config, key, processes) -> Report:
  """What is known of the kernels of a run: from tests before, or from one that is made now."""
  folder = results_folder(config)
  kept = read_json_dict(folder / f"run-{key}.json")
  if kept.get("format") == 1:
    results = read_results(str(folder), results_key(kept["machine"]))
    wanted = {name: fields for name, fields in results.items() if name in kept["cases"] and fields.keys() == FIELDS}
    report = Report(kept["machine"], kept["cases"], {name: Result(**fields) for name, fields in wanted.items()})
    if report.complete:
      return report
  print("self-test  kernels beside XLA's forms, once for these shapes, up to a minute", flush=True)
  try:
    report = run_selftest(config, folder, processes=processes, seconds=SECONDS)
  except ChildFailed as error:
    print(f"self-test  could not run, so kernels are used untested: {error}", flush=True)
    return Report()
  if report.complete and not report.refused:
    try:
      write_atomically(
        folder / f"run-{key}.json", json.dumps({"format": 1, "machine": report.machine, "cases": report.cases})
      )
    except OSError as error:  # the next start tests again
      _log.warning("self-test: cannot write %s: %s", error.filename, error.strerror)
  return report


def _choose(config, key, report, path) -> Choice:
  """By the verdicts: a kernel that failed at one shape is used for none, a slow one not for that shape. A line for each."""
  fields, functions, calls, messages = implementation_fields(config.model), set(), set(), {}
  for case, result in report.results.items():
    field, implementation = fields.get(result.kernel.partition(".")[0], ("", "auto"))
    if result.verdict not in (SLOW, *BROKEN):
      continue
    what = f"{result.kernel} {result.verdict} on {report.machine['chip']} ({result.message})"
    if implementation == "pallas" and result.verdict in BROKEN:
      raise ConfigError(f"{field}=pallas, but {what}: use auto, which falls back to XLA; {AGAIN}")
    if implementation == "pallas":
      messages.setdefault(result.kernel, f"{what}: kept, since {field}=pallas; report: {path}")
    elif result.verdict == SLOW:
      calls.update(report.cases[case][1:])
      messages.setdefault(result.kernel, f"{what}: falling back to XLA for such shapes; report: {path}; {AGAIN}")
    else:
      functions.add(result.kernel)
      messages[result.kernel] = f"{what}: falling back to XLA; report: {path}; {AGAIN}"
  for message in messages.values():
    print(f"self-test  {message}")
  print(f"self-test  {_counts(report)}", flush=True)
  known = sorted({call for names in report.cases.values() for call in names[1:]})
  results = [dataclasses.asdict(result) for result in report.results.values()]
  return Choice(key, report.machine, sorted(functions), sorted(calls), known, results)


def _counts(report) -> str:
  counts = Counter(result.verdict for result in report.results.values())
  missing = len(report.cases) - len(report.results)
  parts = [f"{count} {verdict}" for verdict, count in counts.items()]
  if missing:
    parts.append(f"{missing} not reached, used untested")
  why = f" ({report.stopped})" if report.stopped else ""
  return f"{len(report.cases)} cases: {', '.join(parts) or 'no kernel of ours for this config on this device'}{why}"


def _continued(stored: Choice, new: Choice) -> Choice:
  """The choice of a resume on the same chip: what was replaced stays so, and what was used stays used.

  New are calls that the run did not make before, as on another mesh. Under other versions or kernels, where bits may differ
  in any case, kernels that fail now are replaced too.
  """
  same = results_key(stored.machine) == results_key(new.machine)
  made_before = {call.partition("(")[0] for call in stored.known}
  functions = [name for name in new.functions if not same or name not in made_before]
  calls = [call for call in new.calls if call not in stored.known]
  known = sorted({*stored.known, *new.known})
  return dataclasses.replace(
    new, functions=sorted({*stored.functions, *functions}), calls=sorted({*stored.calls, *calls}), known=known
  )


def _read_choice(path: pathlib.Path) -> Choice | None:
  """The choice of the run so far; None where there is none."""
  if not path.exists():
    return None
  try:
    choice = Choice(**json.loads(path.read_bytes()))
    choice.machine["chip"]
  except (OSError, ValueError, TypeError, KeyError):
    print(f"self-test  {path} is damaged: kernels are chosen anew, and a resume may not be bitwise", flush=True)
    return None
  return choice
