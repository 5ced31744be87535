"""Tests the kernels of a config in processes of their own, and survives what a kernel does to them."""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from deepseek_jax.config import Config
from deepseek_jax.data.cache import exclusive_lock, write_atomically
from deepseek_jax.selftest.check import CRASHED, HUNG, UNCOMPARED, Result, new_result
from deepseek_jax.selftest.child import Request, read_results, results_path
from deepseek_jax.selftest.machine import accelerators, child_environment, cuda_devices, results_key

# Seconds without news after which a process hangs: until the program is traced, in each phase of check.py, while it looks
# whether the device still works.
LIMITS = {"start": 300, "compile": 180, "reference": 60, "kernel": 30, "compare": 60, "time": 60, "device": 30}
GRACE_SECONDS = 10  # for what was begun before the deadline
PROGRAM = "-m", "deepseek_jax.selftest.child"
POLL_SECONDS, RETRY_SECONDS = 0.05, 3
_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Report:
  """What was found.

  machine: as `describe_device`. cases: {key: [kernel, calls it stands for ..]}. results: {key: Result} of those reached.
  refused: why the config cannot run on these devices. stopped: why cases are left although there was time.
  """

  machine: dict[str, str] = dataclasses.field(default_factory=dict)
  cases: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  results: dict[str, Result] = dataclasses.field(default_factory=dict)
  refused: str = ""
  stopped: str = ""

  @property
  def complete(self) -> bool:
    return len(self.results) == len(self.cases) and not self.stopped

  def json(self) -> dict:
    results = [dataclasses.asdict(self.results[key]) for key in self.cases if key in self.results]
    rest = {"refused": self.refused, "stopped": self.stopped, "not_reached": len(self.cases) - len(results)}
    return {**self.machine, **rest, "results": results}


class ChildFailed(RuntimeError):
  """The process that tests kernels ended before it knew which there are."""


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a process ended that did not finish: while it was in `phase` with the cases `keys`; `verdict` on who was at work."""

  keys: list[str]
  phase: str
  verdict: str
  message: str
  transient: bool = False


def run_selftest(
  config: Config,
  folder: pathlib.Path,
  *,
  devices: int = 0,
  any_mesh: bool = False,
  processes: int = 1,
  seconds: float = 0,
  again: bool = False,
  on_result: Callable[[Report, Result], None] = lambda report, result: None,
) -> Report:
  """Tests each kernel that a training step of `config` calls, at its shapes, on the first accelerator of this host.

  Args:
    folder: of the results that are kept; another call tests what is missing.
    devices: of the mesh that shapes are of; 0: the accelerators of this host, times `processes`.
    any_mesh: where those do not fit the mesh, as few as it allows.
    seconds: after which no further kernel is begun; it ends GRACE_SECONDS later. 0: all are tested.
    again: kept results do not count, and are replaced.

  Raises:
    ChildFailed: with what the process said last.
  """
  chips = accelerators()
  if any(chip.startswith("TPU") for chip in chips):
    processes *= len(chips)  # the child sees one of them
  report, alone, retried = Report(), set(), False
  deadline = time.time() + seconds if seconds else 0
  with tempfile.TemporaryDirectory() as scratch:
    for start in range(1000):
      request = Request(
        config=dataclasses.asdict(config), devices=devices, processes=processes, any_mesh=any_mesh,
        cuda_devices=cuda_devices(), journal=f"{scratch}/journal-{start}", results="" if again else str(folder),
        skip=tuple(report.results), compile_alone=tuple(alone), deadline=deadline, parent=os.getpid(),
      )  # fmt: skip
      known = len(report.results), len(alone)
      ended = Child(request, pathlib.Path(scratch), child_environment(chips), report, folder, on_result).follow()
      if ended is None:
        break
      if not report.cases:
        raise ChildFailed(ended.message)
      for key, result in _verdicts(report, ended):
        report.results[key] = result
        on_result(report, result)
      _keep(report, folder)
      alone.update(ended.keys)
      if known == (len(report.results), len(alone)):
        if retried:
          report.stopped = ended.message
          break
        retried = True  # the device may still be busy with the end of a process before
        time.sleep(RETRY_SECONDS)
      if deadline and time.time() > deadline:
        break
  return report


def _verdicts(report, ended) -> Iterator[tuple[str, Result]]:
  """What a process's end says of the cases that it was at."""
  for key in ended.keys:
    name, *stands_for = report.cases[key]
    if ended.phase in ("kernel", "time") or (ended.phase == "compile" and len(ended.keys) == 1):
      yield (
        key,
        dataclasses.replace(new_result(key, name, stands_for, ended.verdict, ended.message), transient=ended.transient),
      )
    elif ended.phase in ("reference", "compare"):
      message = f"XLA's form {ended.verdict}: {ended.message}"
      yield key, dataclasses.replace(new_result(key, name, stands_for, UNCOMPARED, message), transient=True)
  if ended.phase in ("kernel", "time"):  # each further shape could cost as much
    (guilty,) = ended.keys
    for key, (name, *stands_for) in report.cases.items():
      if key != guilty and name == report.cases[guilty][0] and key not in report.results:
        message = f"not tried, since it {ended.verdict} at another shape"
        yield key, dataclasses.replace(new_result(key, name, stands_for, ended.verdict, message), transient=True)


class Child:
  """One process that tests kernels, followed to its end through its journal."""

  def __init__(self, request, scratch, environment, report, folder, on_result):
    self._path, self._log, self._journal = scratch / "request.json", scratch / "log", pathlib.Path(request.journal)
    self._path.write_text(json.dumps(dataclasses.asdict(request)))
    self._journal.touch()
    self._environment, self._report, self._folder, self._on_result = environment, report, folder, on_result
    self._end_of_time = request.deadline + GRACE_SECONDS if request.deadline else float("inf")
    self._keys, self._phase, self._said, self._finished = [], "start", "", False

  def follow(self) -> Ended | None:
    """Hands results over as they come; None where the process finished."""
    with self._process() as process, open(self._journal, encoding="utf-8") as lines:
      heard, rest = time.monotonic(), ""
      while True:
        running = process.poll() is None
        *complete, rest = (rest + lines.read()).split("\n")
        for line in complete:
          heard = time.monotonic()
          self._take(json.loads(line))
        if self._finished:
          return None
        if not running:
          code = process.returncode
          return Ended(self._keys, self._phase, CRASHED, self._reason(code), transient=code == -signal.SIGKILL)
        if time.monotonic() - heard > LIMITS[self._phase]:
          return Ended(self._keys, self._phase, HUNG, f"no news for {LIMITS[self._phase]} s ({self._phase})")
        if time.time() > self._end_of_time:
          # A kernel that was begun in time has had GRACE_SECONDS.
          at_kernel = self._phase == "kernel"
          return Ended(
            self._keys if at_kernel else [], self._phase, HUNG, f"no end within {GRACE_SECONDS} s ({self._phase})"
          )
        time.sleep(POLL_SECONDS)

  def _take(self, event):
    """Takes in one line of the journal."""
    report = self._report
    if "phase" in event:
      self._keys, self._phase = event["begin"], event["phase"]
    elif "machine" in event:
      report.machine = event["machine"]
    elif "cases" in event:
      report.cases, self._phase = event["cases"], "compile"
    elif "result" in event:
      try:
        result = Result(**event["result"])
      except TypeError:  # kept by another version
        return
      report.results[event["key"]], self._keys = result, []
      if not event.get("known"):
        _keep(report, self._folder)
      self._on_result(report, result)
    elif "failed" in event:
      self._said = event["failed"]
    else:
      report.refused, self._finished = event.get("refused", ""), True

  @contextlib.contextmanager
  def _process(self) -> Iterator[subprocess.Popen]:
    """The process, in a session of its own, which has ended after the block."""
    # The package is found as it was by this process.
    root = str(pathlib.Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (self._environment.get("PYTHONPATH", ""), root)))
    with open(self._log, "ab") as output:
      process = subprocess.Popen(
        [sys.executable, *PROGRAM, str(self._path)],
        stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self._environment | {"PYTHONPATH": paths},
        start_new_session=True,
      )  # fmt: skip
    try:
      yield process
      if self._finished:
        with contextlib.suppress(subprocess.TimeoutExpired):
          process.wait(10)  # it gives the device back
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      try:
        process.wait(30)
      except subprocess.TimeoutExpired:
        _log.warning("self-test: process %d does not end after SIGKILL, and may hold the device", process.pid)

  def _reason(self, code: int) -> str:
    """Why the process ended, in a line."""
    lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
    said = self._said or (lines[-1] if lines else "it said nothing")
    return f"{signal.Signals(-code).name if code < 0 else f'exit code {code}'}: {said:.300}"


def _keep(report, folder):
  """Adds the results that last to those that are kept for such a machine."""
  lasting = {key: dataclasses.asdict(result) for key, result in report.results.items() if not result.transient}
  path = results_path(str(folder), results_key(report.machine))
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder / "lock", "keeps results of kernels"):
      write_atomically(path, json.dumps(read_results(str(folder), results_key(report.machine)) | lasting, indent=1))
  except OSError as error:  # a run does not depend on it
    _log.warning("self-test: results are not kept: cannot write %s: %s", error.filename, error.strerror)
