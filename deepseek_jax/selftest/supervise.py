"""Tests the kernels of a config in child processes, and goes on when a kernel crashes or hangs one."""

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
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.data.cache import exclusive_lock, write_atomically
from deepseek_jax.selftest.check import CRASHED, HUNG, UNCOMPARED, Result, new_result
from deepseek_jax.selftest.child import Request, read_results, results_path
from deepseek_jax.selftest.machine import child_environment, cuda_devices, results_key

# Seconds without an event in the journal after which a process counts as hung, by phase: tracing the program, the
# phases of check.py, and the test whether the device still works.
PHASE_TIMEOUTS = {"start": 300, "compile": 180, "reference": 60, "kernel": 30, "compare": 60, "time": 60, "device": 30}
GRACE_SECONDS = 10  # after the deadline, for a kernel that was started before
CHILD_COMMAND = "-m", "deepseek_jax.selftest.child"
POLL_SECONDS, RETRY_SECONDS = 0.05, 3
_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Report:
  """The outcome of a self-test.

  machine: as `describe_device` gives it. cases: {key: [kernel, calls that it covers ..]}. results: {key: Result} of
  those reached.
  refused: why the config cannot run on these devices. stopped: why cases are left although there was time.
  """

  machine: dict[str, str] = dataclasses.field(default_factory=dict)
  cases: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  results: dict[str, Result] = dataclasses.field(default_factory=dict)
  refused: str = ""
  stopped: str = ""

  @property
  def complete(self) -> bool:
    """Whether every case has a result."""
    return len(self.results) == len(self.cases) and not self.stopped

  def json(self) -> dict[str, Any]:
    """The report of --json."""
    results = [dataclasses.asdict(self.results[key]) for key in self.cases if key in self.results]
    status = {"refused": self.refused, "stopped": self.stopped, "not_reached": len(self.cases) - len(results)}
    return {**self.machine, **status, "results": results}


class ChildFailed(RuntimeError):
  """The process that tests kernels ended before it had listed its cases."""


@dataclasses.dataclass(frozen=True)
class ChildExit:
  """How a process ended that did not finish: in `phase` of the cases `keys`, with this verdict on them.

  transient: as of `Result`.
  """

  keys: list[str]
  phase: str
  verdict: str
  message: str
  transient: bool = False


def run_selftest(
  config: Config,
  folder: pathlib.Path,
  chips: list[str],
  *,
  devices: int = 0,
  any_mesh: bool = False,
  processes: int = 1,
  seconds: float = 0,
  retest: bool = False,
  on_result: Callable[[Report, Result], None] = lambda report, result: None,
) -> Report:
  """Tests each kernel that a training step of `config` calls, at its shapes, on the first accelerator of this host.

  Args:
    folder: of saved results; another call tests what is missing.
    chips: the accelerators of this host, as `machine.accelerators` gives them.
    devices: of the mesh whose local shapes are tested; 0: `chips` times `processes`.
    any_mesh: where those do not fit the mesh, use as few devices as it allows.
    seconds: after which no further kernel is started; the test ends GRACE_SECONDS later. 0: all are tested.
    retest: ignore saved results, and replace them.
    on_result: called with each result as it comes.

  Raises:
    ChildFailed: with the last message of the process.
  """
  if any(chip.startswith("TPU") for chip in chips):
    processes *= len(chips)  # the child sees one of them
  report, compile_alone, retried = Report(), set[str](), False
  deadline = time.time() + seconds if seconds else 0
  with tempfile.TemporaryDirectory() as scratch:
    for start in range(1000):
      request = Request(
        config=dataclasses.asdict(config), devices=devices, processes=processes, any_mesh=any_mesh,
        cuda_devices=cuda_devices(), journal=f"{scratch}/journal-{start}", results="" if retest else str(folder),
        skip=tuple(report.results), compile_alone=tuple(compile_alone), deadline=deadline, parent=os.getpid(),
      )  # fmt: skip
      progress = len(report.results), len(compile_alone)
      child_exit = Child(request, pathlib.Path(scratch), child_environment(chips), report, folder, on_result).follow()
      if child_exit is None:
        break
      if not report.cases:
        raise ChildFailed(child_exit.message)
      for key, result in _verdicts(report, child_exit):
        report.results[key] = result
        on_result(report, result)
      _save_results(report, folder)
      compile_alone.update(child_exit.keys)
      if progress == (len(report.results), len(compile_alone)):
        if retried:
          report.stopped = child_exit.message
          break
        retried = True  # the device may still be held by a process that is ending
        time.sleep(RETRY_SECONDS)
      if deadline and time.time() > deadline:
        break
  return report


def _verdicts(report: Report, child_exit: ChildExit) -> Iterator[tuple[str, Result]]:
  """Results of the cases that a process was at when it ended, and of other shapes of the same kernel."""
  keys, phase, verdict = child_exit.keys, child_exit.phase, child_exit.verdict
  for key in keys:
    name, *covers = report.cases[key]
    if phase in ("kernel", "time") or (phase == "compile" and len(keys) == 1):
      result = new_result(key, name, covers, verdict, child_exit.message)
      yield key, dataclasses.replace(result, transient=child_exit.transient)
    elif phase in ("reference", "compare"):
      message = f"XLA {verdict}: {child_exit.message}"
      yield key, dataclasses.replace(new_result(key, name, covers, UNCOMPARED, message), transient=True)
  if phase in ("kernel", "time"):  # other shapes may crash or hang too, and each would cost as much time
    (failed_key,) = keys
    for key, (name, *covers) in report.cases.items():
      if key != failed_key and name == report.cases[failed_key][0] and key not in report.results:
        message = f"not tried, since it {verdict} at another shape"
        yield key, dataclasses.replace(new_result(key, name, covers, verdict, message), transient=True)


class Child:
  """One process that tests kernels, followed through its journal until it ends."""

  def __init__(
    self,
    request: Request,
    scratch: pathlib.Path,
    environment: dict[str, str],
    report: Report,
    folder: pathlib.Path,
    on_result: Callable[[Report, Result], None],
  ):
    self._path, self._log, self._journal = scratch / "request.json", scratch / "log", pathlib.Path(request.journal)
    self._path.write_text(json.dumps(dataclasses.asdict(request)))
    self._journal.touch()
    self._environment, self._report, self._folder, self._on_result = environment, report, folder, on_result
    self._deadline = request.deadline + GRACE_SECONDS if request.deadline else float("inf")
    self._keys: list[str] = []
    self._phase, self._error, self._finished = "start", "", False

  def follow(self) -> ChildExit | None:
    """Adds results to the report as they come. Returns None where the process finished."""
    with self._process() as process, open(self._journal, encoding="utf-8") as lines:
      last_event, partial_line = time.monotonic(), ""
      while True:
        running = process.poll() is None
        *complete_lines, partial_line = (partial_line + lines.read()).split("\n")
        for line in complete_lines:
          last_event = time.monotonic()
          self._handle_event(json.loads(line))
        if self._finished:
          return None
        if not running:
          code = process.returncode
          return ChildExit(self._keys, self._phase, CRASHED, self._reason(code), transient=code == -signal.SIGKILL)
        if time.monotonic() - last_event > PHASE_TIMEOUTS[self._phase]:
          return ChildExit(
            self._keys, self._phase, HUNG, f"no event for {PHASE_TIMEOUTS[self._phase]} s ({self._phase})"
          )
        if time.time() > self._deadline:
          # A kernel that was started before the deadline has had GRACE_SECONDS. A program that compiles may only be
          # slow.
          at_kernel = self._phase == "kernel"
          return ChildExit(
            self._keys if at_kernel else [], self._phase, HUNG, f"not finished within {GRACE_SECONDS} s ({self._phase})"
          )
        time.sleep(POLL_SECONDS)

  def _handle_event(self, event: dict[str, Any]) -> None:
    """Handles one line of the journal."""
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
      except TypeError:  # saved by another version
        return
      report.results[event["key"]], self._keys = result, []
      if not event.get("known"):
        _save_results(report, self._folder)
      self._on_result(report, result)
    elif "failed" in event:
      self._error = event["failed"]
    else:
      report.refused, self._finished = event.get("refused", ""), True

  @contextlib.contextmanager
  def _process(self) -> Iterator[subprocess.Popen]:
    """Starts the process in a session of its own. It has ended after the block."""
    # The child imports the package from where this process did.
    root = str(pathlib.Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (self._environment.get("PYTHONPATH", ""), root)))
    with open(self._log, "ab") as output:
      process = subprocess.Popen(
        [sys.executable, *CHILD_COMMAND, str(self._path)],
        stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self._environment | {"PYTHONPATH": paths},
        start_new_session=True,
      )  # fmt: skip
    try:
      yield process
      if self._finished:
        with contextlib.suppress(subprocess.TimeoutExpired):
          process.wait(10)  # so that it releases the device
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      try:
        process.wait(30)
      except subprocess.TimeoutExpired:
        _log.warning("self-test: process %d is still running after SIGKILL, and may hold the device", process.pid)

  def _reason(self, code: int) -> str:
    """Why the process ended, in a line."""
    lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
    message = self._error or (lines[-1] if lines else "no output")
    exit_status = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"{exit_status}: {message:.300}"


def _save_results(report: Report, folder: pathlib.Path) -> None:
  """Adds the results that are not transient to the saved ones of such a machine."""
  results = {key: dataclasses.asdict(result) for key, result in report.results.items() if not result.transient}
  path = results_path(str(folder), results_key(report.machine))
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder / "lock", "saves results of kernels"):
      write_atomically(path, json.dumps(read_results(str(folder), results_key(report.machine)) | results, indent=1))
  except OSError as error:  # the run goes on without
    _log.warning("self-test: results are not saved: cannot write %s: %s", error.filename, error.strerror)
