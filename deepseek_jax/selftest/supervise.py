"""Tests the kernels of a config in processes of their own, and survives what a kernel does to them."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from deepseek_jax.config import Config
from deepseek_jax.data.cache import write_atomically
from deepseek_jax.errors import ConfigError
from deepseek_jax.selftest.check import CRASHED, HUNG, Result, new_result
from deepseek_jax.selftest.child import Request, read_results, results_path
from deepseek_jax.selftest.machine import accelerators, child_environment, cuda_devices, results_key

# How long nothing may be heard, in seconds: until the program is traced, while some cases are compiled, while one runs.
LIMITS = {"start": 300, "compile": 180, "run": 30}
POLL_SECONDS = 0.05


@dataclasses.dataclass
class Report:
  """machine: as `describe_device`. cases: {key: [kernel, calls it stands for ..]}; results: {key: Result} of those reached.

  refused: why the config cannot run on these devices, or "".
  """

  machine: dict[str, str] = dataclasses.field(default_factory=dict)
  cases: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  results: dict[str, Result] = dataclasses.field(default_factory=dict)
  refused: str = ""

  def json(self) -> dict:
    results = [dataclasses.asdict(self.results[key]) for key in self.cases if key in self.results]
    return {**self.machine, "refused": self.refused, "not_reached": len(self.cases) - len(results), "results": results}


class ChildFailed(RuntimeError):
  """The process that tests kernels ended before it came to one."""


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
    seconds: after which no further case is begun; 0: all are tested.
    again: kept results do not count, and are replaced.

  Raises:
    ChildFailed: with what the process said last.
  """
  chips = accelerators()
  multiple = processes * (len(chips) if any(chip.startswith("TPU") for chip in chips) else 1)
  folder.mkdir(parents=True, exist_ok=True)
  report, alone, restarts = Report(), set(), 0
  deadline = time.time() + seconds if seconds else 0
  with tempfile.TemporaryDirectory() as scratch:
    while True:
      journal = pathlib.Path(scratch, f"journal-{restarts}")
      request = Request(
        dataclasses.asdict(config), devices, multiple, any_mesh, cuda_devices(), str(journal), "" if again else str(folder),
        tuple(report.results), tuple(alone), deadline,
      )  # fmt: skip
      begun, lost, ended = _follow(request, pathlib.Path(scratch), child_environment(chips), report, folder, on_result)
      if ended is None:
        return report
      if len(begun) == 1:
        for key, result in _blame(report, begun[0], *ended):
          report.results[key] = result
          on_result(report, result)
        _keep(report, folder)
      elif not begun and not lost:
        raise ChildFailed(ended[1])
      if deadline and time.time() > deadline:
        return report
      alone.update(begun)
      restarts += 1


def _follow(request, scratch, environment, report, folder, on_result):
  """Runs one child to its end: (keys of the cases that it was at, whether it lost the device, None or
  (verdict, message) of why it did not finish)."""
  path, log = scratch / "request.json", scratch / "log"
  path.write_text(json.dumps(dataclasses.asdict(request)))
  journal, begun, phase, lost = pathlib.Path(request.journal), [], "start", False
  journal.touch()
  with _child(path, log, environment) as process, open(journal, encoding="utf-8") as lines:
    heard, buffer = time.monotonic(), ""
    while True:
      running = process.poll() is None
      buffer += lines.read()
      *complete, buffer = buffer.split("\n")
      for event in map(json.loads, complete):
        heard = time.monotonic()
        for key in ("compile", "run"):
          begun, phase = (event[key], key) if key in event else (begun, phase)
        if "end" in event or "refused" in event:
          report.refused = event.get("refused", "")
          return [], False, None
        lost = lost or "device_lost" in event
        if "result" in event:
          begun = []
        _take(event, report, folder, on_result)
      if not running:
        return begun, lost, (CRASHED, _last_words(process.returncode, log))
      if time.monotonic() - heard > LIMITS[phase]:
        os.killpg(process.pid, signal.SIGKILL)
        return begun, lost, (HUNG, f"nothing for {LIMITS[phase]} s ({phase})")
      time.sleep(POLL_SECONDS)


def _take(event, report, folder, on_result):
  if "machine" in event:
    report.machine = event["machine"]
  if "cases" in event:
    report.cases = event["cases"]
  if "result" in event:
    result = Result(**event["result"])
    report.results[event["key"]] = result
    if not event.get("known"):
      _keep(report, folder)
    on_result(report, result)


@contextlib.contextmanager
def _child(request, log, environment) -> Iterator[subprocess.Popen]:
  """The process, in a session of its own, which has ended after the block."""
  # The package is found as it was by this process.
  paths = [str(pathlib.Path(__file__).parents[2]), *environment.get("PYTHONPATH", "").split(os.pathsep)]
  environment = environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
  with open(log, "ab") as output:
    process = subprocess.Popen(
      [sys.executable, "-m", "deepseek_jax.selftest.child", str(request)],
      stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True,
    )  # fmt: skip
  try:
    yield process
  finally:
    if process.poll() is None:
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)  # it has said that it is done, and gives the device back
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_words(code: int, log: pathlib.Path) -> str:
  how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
  lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
  return f"{how}: {lines[-1].strip() if lines else 'it said nothing':.300}"


def _blame(report, guilty, verdict, message) -> Iterator[tuple[str, Result]]:
  """Verdicts on the case `guilty`, and on those of the same kernel that are left: they are not tried."""
  for key, (name, *stands_for) in report.cases.items():
    if key == guilty or (name == report.cases[guilty][0] and key not in report.results):
      text = message if key == guilty else "not tried: see its other shape"
      yield key, new_result(key, name, stands_for, verdict, text)


def _keep(report, folder):
  """Adds the results to those that are kept for such a machine."""
  key = results_key(report.machine)
  known = read_results(str(folder), key) | {name: dataclasses.asdict(r) for name, r in report.results.items()}
  try:
    write_atomically(results_path(str(folder), key), json.dumps(known, indent=1))
  except OSError as error:
    raise ConfigError(
      f"cannot write {error.filename}: {error.strerror}; choose another folder with data.cache"
    ) from None
