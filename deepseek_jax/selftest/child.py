"""The process that opens the device:  python -m deepseek_jax.selftest.child REQUEST.json

It may crash or hang at any kernel. So it writes to a journal, line by line, what it is about to do and the results.
`supervise.py` reads the journal, and starts another process for the cases after the kernel at fault.
"""

import concurrent.futures
import ctypes
import dataclasses
import functools
import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from deepseek_jax.config import Config
from deepseek_jax.data.cache import read_json_dict
from deepseek_jax.errors import ConfigError
from deepseek_jax.schema import from_dict

if TYPE_CHECKING:  # it imports jax
  from deepseek_jax.selftest.cases import Case

COMPILE_BATCH = 8  # cases that are compiled at once; their inputs wait in the host's memory


@dataclasses.dataclass(frozen=True)
class Request:
  """What to test. JSON in a file.

  config: as `dataclasses.asdict` gives it.
  devices: of the mesh; 0: those that this process sees, times `processes`.
  any_mesh: where those do not fit the mesh, use as few devices as it allows.
  cuda_devices: the GPUs that this process may see, as jax_cuda_visible_devices.
  journal: the file that lines are appended to.
  results: a folder of saved results, or "".
  skip: keys of cases that are done. compile_alone: keys of cases that are compiled one by one.
  deadline: seconds since the epoch after which no kernel is started; 0: none.
  parent: id of the process that asks.
  """

  config: dict
  devices: int
  processes: int
  any_mesh: bool
  cuda_devices: str
  journal: str
  results: str
  skip: tuple[str, ...]
  compile_alone: tuple[str, ...]
  deadline: float
  parent: int


class Journal:
  """Lines of JSON for the parent, which reads them while this process works."""

  def __init__(self, path: str):
    self._file = open(path, "a", encoding="utf-8")

  def write(self, **event: Any) -> None:
    self._file.write(json.dumps(event) + "\n")
    self._file.flush()

  def begin(self, keys: Iterable[str], phase: str) -> None:
    """Writes that `phase` begins for the cases `keys`."""
    self.write(begin=list(keys), phase=phase)


def main(path: str) -> None:
  request = Request(**json.loads(pathlib.Path(path).read_text()))
  exit_with_parent(request.parent)
  journal = Journal(request.journal)
  try:
    test_kernels(request, journal)
  except Exception as error:  # for a message in one line; the traceback is on stderr
    journal.write(failed=f"{type(error).__name__}: {error}")
    raise


def test_kernels(request: Request, journal: Journal) -> None:
  """Tests the cases of `request`, and writes each event to `journal`."""
  # Imported late: an import may crash, and the journal must exist before.
  import jax

  from deepseek_jax.mesh import check_x64
  from deepseek_jax.model.linear import matmul_precision
  from deepseek_jax.selftest.cases import make_cases, program_calls
  from deepseek_jax.selftest.machine import describe_device, results_key

  config = from_dict(Config, request.config)
  if request.cuda_devices != "all":
    jax.config.update("jax_cuda_visible_devices", request.cuda_devices)
  device = jax.devices()[0]
  machine = describe_device(device, config.model.compute_dtype)
  journal.write(machine=machine)
  abstract = jax.sharding.AbstractDevice(device.device_kind, 1, device.platform)
  try:
    check_x64(config.model)
    cases = make_cases(program_calls(_resolve_mesh(config, request, len(jax.devices())), abstract))
  except ConfigError as error:
    journal.write(refused=str(error))
    return
  journal.write(cases={case.key: [case.name, *case.covers] for case in cases})
  known = read_results(request.results, results_key(machine)) if request.results else {}
  for case in cases:
    if case.key in known and case.key not in request.skip:
      journal.write(result=known[case.key], key=case.key, known=True)
  todo = [case for case in cases if case.key not in known and case.key not in request.skip]
  _check_cases(todo, request, journal, functools.partial(matmul_precision, config.model))
  journal.write(end=True)


def _resolve_mesh(config: Config, request: Request, local_devices: int) -> Config:
  """`config` with its mesh resolved, for a process that sees `local_devices` devices."""
  from deepseek_jax.mesh import min_devices, resolve_mesh

  try:
    return resolve_mesh(config, request.devices or local_devices * request.processes)
  except ConfigError:
    if request.devices or not request.any_mesh:
      raise
    return resolve_mesh(config, min_devices(config.mesh))


def _check_cases(cases: "list[Case]", request: Request, journal: Journal, precision: Callable) -> None:
  """Compiles a few cases at once, then runs them one after the other, until all are done or the deadline is past."""
  from deepseek_jax.selftest.check import FAILED, check_case, compile_case, device_works

  def deadline_is_past():
    return request.deadline and time.time() > request.deadline

  alone = [case for case in cases if case.key in request.compile_alone]
  others = [case for case in cases if case.key not in request.compile_alone]
  batch = min(os.cpu_count() or 1, COMPILE_BATCH)
  batches = [[case] for case in alone] + [others[i : i + batch] for i in range(0, len(others), batch)]
  with concurrent.futures.ThreadPoolExecutor(batch) as pool:
    for members in batches:
      if deadline_is_past():
        return
      journal.begin([case.key for case in members], "compile")
      for case, programs in zip(
        members, list(pool.map(functools.partial(compile_case, precision=precision), members)), strict=True
      ):
        if deadline_is_past():
          return
        result = check_case(case, programs, functools.partial(journal.begin, [case.key]))
        journal.write(result=dataclasses.asdict(result), key=case.key)
        if result.verdict == FAILED:
          journal.begin([], "device")
          if not device_works():
            os._exit(1)  # the client of a lost device may never finish


def results_path(folder: str, key: str) -> pathlib.Path:
  """The file of saved results; `key` as `machine.results_key` gives it."""
  return pathlib.Path(folder) / f"results-{key}.json"


def read_results(folder: str, key: str) -> dict[str, dict]:
  """{key of a case: fields of its Result} saved for such a machine; empty where the file is missing or damaged."""
  return {
    name: result for name, result in read_json_dict(results_path(folder, key)).items() if isinstance(result, dict)
  }


def exit_with_parent(parent: int) -> None:
  """Has Linux kill this process when `parent` ends, so that a killed parent leaves no process that holds the device."""
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # the parent has already ended
      sys.exit(1)


if __name__ == "__main__":
  main(sys.argv[1])
