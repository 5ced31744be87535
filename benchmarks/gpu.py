"""All benchmarks for one Hopper GPU, in two parts of under 5 minutes:  python -m benchmarks.gpu --part=1, then --part=2

- Part 1: the self-tests of the kernels at the shapes of V3 and of 67B; FP8 GEMMs and attention beside other software.
- Part 2: tunes the tiles of the kernels; then times training steps of benchmarks/dense_1b.py and v3_3b.py in bf16 and
  in FP8, and runs `deepseek_jax.plan` for them. Fields of these two configs can be set:
  --config.model.attention.implementation=xla.

Each step is a program with a time limit (benchmarks/gpu_steps.py). All results are in --out: gpu.json, gpu.log,
tiles.json. The same command continues after any interruption, also kill -9: finished steps are skipped, the others
continue with the missing rows, failed steps come last. `python -m benchmarks.gpu_report` writes the results into the
docs.

Exit codes: 0: all steps are done; 1: a step failed, none remains; 2: user error; 3: steps remain; 130, 143:
interrupted.
"""

import contextlib
import datetime
import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from absl import flags

from benchmarks.gpu_steps import STEPS, Step
from benchmarks.results import UNFINISHED, read_json, write_json
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import parse, run_program, split_overrides
from launch.supervise import die_with_launcher

ROOT = pathlib.Path(__file__).resolve().parents[1]
TILES_FILE = ROOT / "deepseek_jax" / "kernels" / "tiles.json"  # the kernels read it
MAX_ROUNDS = 4  # of steps that were cut off, in the time that others did not use
MIN_STEP_SECONDS = 3  # no step starts with less time
TERMINATION_SECONDS = 2  # from SIGTERM to SIGKILL
DONE, FAILED, CUT_OFF = "done", "failed", "cut off"  # statuses in gpu.json; cut off: at its time limit


def main(argv: list[str]) -> int:
  values = flags.FlagValues()
  flags.DEFINE_integer("part", None, "1 or 2", lower_bound=1, upper_bound=2, flag_values=values)
  flags.DEFINE_string("out", "runs/gpu", "folder of the results", flag_values=values)
  flags.DEFINE_float("seconds", 280, "time limit of this call", lower_bound=1, flag_values=values)
  flags.DEFINE_string("topology", None, "of the plans; default: this machine's GPU", flag_values=values)
  flags.DEFINE_string("commit", None, "commit of this code, if there is no git", flag_values=values)
  flags.DEFINE_bool("toy", False, "small sizes that take seconds, on any platform", flag_values=values)
  arguments, overrides = split_overrides(argv)
  parse(arguments, values, __doc__)
  if values.part is None:
    raise ConfigError("--part=1 or --part=2 is required (see --help)")
  driver = Driver(values, overrides)
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, driver.stop)
  code = driver.run(values.seconds)
  command = shlex.join(["python", "-m", "benchmarks.gpu", *argv[1:]])
  for status, names in driver.unfinished().items():
    print(f"{status}: {', '.join(names)}; to continue: {command}")
  print(f"results: {driver.path}")
  return code


class Driver:
  """Runs a part's steps and records them in gpu.json: {"machine", "toy", "steps": {name: entry of `_record_step`}}."""

  def __init__(self, values: flags.FlagValues, overrides: Mapping[str, str]):
    self._toy, self._start = values.toy, time.monotonic()
    self._signal: int | None = None
    self._lock, self._deadline = threading.RLock(), float("inf")
    self._out = pathlib.Path(values.out).resolve()
    self._out.mkdir(parents=True, exist_ok=True)
    self.path, machine = self._out / "gpu.json", machine_info()
    self._commit = values.commit or git_commit()
    self._record = read_json(self.path) or {"machine": machine, "toy": values.toy, "steps": {}}
    recorded = describe_machine(self._record["machine"], self._record["toy"])
    current = describe_machine(machine, values.toy)
    if recorded != current:
      raise ConfigError(f"{self.path} has results of {recorded}, and this is {current}: give another --out")
    topology = values.topology or topology_name(self._record["machine"]["chip"]) or ("h100" if values.toy else None)
    self._fields = {"out": str(self._out), "topology": topology, "attention": attention_implementation()}
    self._overrides = [f"--config.{path}={value}" for path, value in overrides.items()]
    self._steps = [step for step in STEPS if step.part == values.part and (topology or step.needs_gpu)]

  def run(self, seconds: float) -> int:
    """Runs the steps that are not done, for `seconds` at most. Returns the exit code."""
    self._deadline = self._start + seconds
    steps = sorted((s for s in self._steps if self._status(s) != DONE), key=lambda s: self._status(s) == FAILED)
    on_cpu = threading.Thread(target=self._run_steps, args=([s for s in steps if not s.needs_gpu],), daemon=True)
    on_cpu.start()
    self._run_steps([step for step in steps if step.needs_gpu])
    on_cpu.join()
    if self._signal:
      return 128 + self._signal
    unfinished = self.unfinished()
    return UNFINISHED if set(unfinished) - {FAILED} else int(bool(unfinished))

  def unfinished(self) -> dict[str, list[str]]:
    """{status: names of the steps of this part with that status}, without those that are done."""
    names: dict[str, list[str]] = {}
    for step in self._steps:
      if (status := self._status(step)) != DONE:
        names.setdefault(status, []).append(step.name)
    return names

  def stop(self, number: int, frame: object) -> None:
    """A signal handler: ends the step that runs, and starts no other."""
    self._signal = number

  def _run_steps(self, steps: list[Step]) -> None:
    for _ in range(MAX_ROUNDS):
      for i, step in enumerate(steps):
        remaining, reserved = self._deadline - time.monotonic(), sum(s.seconds for s in steps[i + 1 :])
        if self._signal or remaining < MIN_STEP_SECONDS:
          return
        self._execute(step, min(max(step.seconds, remaining - reserved), remaining))
      steps = [step for step in steps if self._status(step) == CUT_OFF]

  def _status(self, step: Step) -> str:
    """How the last run of the same command ended, or "not run"."""
    entry = self._record["steps"].get(step.name, {})
    return entry["status"] if entry and entry["arguments"] == self._template(step) else "not run"

  def _template(self, step: Step) -> list[str]:
    """The command, with placeholders for what changes from call to call."""
    fields = PartialFields({name: self._fields[name] for name in ("topology", "attention")})
    arguments = [
      *step.command,
      *(step.toy_arguments if self._toy else ()),
      *(self._overrides if step.has_config else ()),
    ]
    return [argument.format_map(fields) for argument in arguments]

  def _execute(self, step: Step, limit: float) -> None:
    """Runs a step for `limit` seconds at most. Records how it ended, and its results."""
    result = self._out / f"{step.name}.json"
    previous = self._restore(step, result)
    self._install_tiles()
    fields = {"out": str(self._out), "json": str(result), "seconds": f"{limit - min(15, limit / 3):.0f}"}
    command = [argument.format_map(fields) for argument in self._template(step)]
    self._print(f"== {step.name}, {limit:.0f} s at most: python {shlex.join(command)}")
    start, date = time.monotonic(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    self._record_step(step, CUT_OFF, None, 0.0, date, command, previous)  # in case this process is killed
    code = self._run_process([sys.executable, *command], step.environment, start + limit)
    status, seconds = {0: DONE, UNFINISHED: CUT_OFF, None: CUT_OFF}.get(code, FAILED), time.monotonic() - start
    self._print(f"== {step.name}: {status}, exit code {code}, {seconds:.0f} s")
    content = None
    with contextlib.suppress(ConfigError):  # a program that does not write atomically may leave half a file
      content = read_json(result)
    self._record_step(step, status, code, seconds, date, command, content)
    result.unlink(missing_ok=True)  # gpu.json has them: few files need to be copied from the machine

  def _restore(self, step: Step, result: pathlib.Path) -> Any:
    """Writes the step's earlier results to the file `result`, to continue from. Returns those in the record.

    If the file exists, a call was killed, and the file is newer than the record. Results of another command are
    removed.
    """
    entry = self._record["steps"].get(step.name)
    if not entry or entry["arguments"] != self._template(step):
      result.unlink(missing_ok=True)
      return None
    if entry["result"] is not None and not result.exists():
      write_json(result, entry["result"])
    return entry["result"]

  def _record_step(
    self, step: Step, status: str, code: int | None, seconds: float, date: str, command: list[str], result: Any
  ) -> None:
    with self._lock:
      self._record["steps"][step.name] = {
        "status": status, "exit_code": code, "seconds": round(seconds, 1), "date": date, "commit": self._commit,
        "command": shlex.join(["python", *command]), "arguments": self._template(step), "result": result,
      }  # fmt: skip
      write_json(self.path, self._record)

  def _run_process(self, command: list[str], environment: Mapping[str, str], deadline: float) -> int | None:
    """The exit code of a program in a process group of its own, or None if it was terminated."""
    process = subprocess.Popen(
      command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **environment}, start_new_session=True,
      preexec_fn=die_with_launcher, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
      errors="replace",
    )  # fmt: skip

    def print_output():
      for line in process.stdout:
        self._print(line.rstrip("\n"))

    reader = threading.Thread(target=print_output, daemon=True)
    reader.start()
    while process.poll() is None and time.monotonic() < deadline and not self._signal:
      time.sleep(0.05)
    code = process.poll()
    for number in (signal.SIGTERM, signal.SIGKILL):
      with contextlib.suppress(ProcessLookupError):  # the group has ended
        os.killpg(process.pid, number)
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(TERMINATION_SECONDS)
    reader.join(1)
    return code

  def _print(self, line: str) -> None:
    with self._lock:
      print(line, flush=True)
      with open(self._out / "gpu.log", "a", encoding="utf-8") as f:
        f.write(line + "\n")

  def _install_tiles(self) -> None:
    """Adds the measured tiles to those that the kernels use."""
    if not self._toy:
      with self._lock:
        merge_tiles(self._out / "tiles.json", TILES_FILE)


class PartialFields(dict):
  """Fields of a format string; placeholders of missing ones stay."""

  def __missing__(self, name: str) -> str:
    return f"{{{name}}}"


def machine_info() -> dict[str, Any]:
  """Chip, driver, memory, versions and CPUs: what results depend on."""
  on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
  gpu: dict[str, str | None] = {"chip": "cpu" if on_cpu else None, "driver": None, "memory": None}
  if not on_cpu:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
      query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
      lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
      gpu = dict(zip(gpu, (text.strip() for text in lines[0].split(",")), strict=True))
  if not gpu["chip"]:
    query = [sys.executable, "-c", "import jax; print(jax.devices()[0].device_kind)"]
    gpu["chip"] = subprocess.run(query, capture_output=True, text=True).stdout.strip() or "no device"
  versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
  return gpu | versions | {"python": platform.python_version(), "cpus": os.cpu_count()}


def describe_machine(machine: Mapping[str, Any], toy: bool) -> str:
  """What the steps of one record have in common, in words."""
  return f"{machine['chip']}, jax {machine['jax']}, {'with' if toy else 'without'} --toy"


def git_commit() -> str | None:
  """Commit of the checkout, with -dirty if files other than the tiles differ from it; None without git."""
  git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
  with contextlib.suppress(OSError, subprocess.SubprocessError):
    name = git(["git", "rev-parse", "--short=7", "HEAD"]).stdout.strip()
    changed = git(
      ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", f":!{TILES_FILE.relative_to(ROOT)}"]
    )
    return name + ("-dirty" if changed.stdout else "")
  return None


def topology_name(chip: str) -> str | None:
  """The name of a GPU in deepseek_jax.plan, or None."""
  match = re.search(r"\b(A100|H100|H200|H800|B200)\b", chip)
  return match and match[1].lower()


def attention_implementation() -> str:
  """The attention that plans count: the kernel if the library that has it is installed."""
  return "pallas" if importlib.util.find_spec("tokamax") else "auto"


def merge_tiles(source: pathlib.Path, target: pathlib.Path) -> None:
  """Adds the tiles of one file to another: {operation: {chip: {sizes: tiles}}}."""
  new = read_json(source)
  if not new:
    return
  table = read_json(target) or {}
  for operation, chips in new.items():
    for chip, tiles in chips.items():
      table.setdefault(operation, {}).setdefault(chip, {}).update(tiles)
  if table != read_json(target):
    write_json(target, table, sort_keys=True)


if __name__ == "__main__":
  run_program(main)
