"""What a Hopper GPU is asked, in two parts of under 5 minutes:  python -m benchmarks.gpu --part=1, then --part=2

Part 1: the self-tests of the kernels at the shapes of V3 and of 67B, the FP8 kernels and attention beside other software.
Part 2: the tiles of the kernels, then training steps of benchmarks/dense_1b.py and v3_3b.py in bf16 and in fp8, and beside
them what `deepseek_jax.plan` predicts. Fields of these two configs can be set: --config.model.attention.implementation=xla.

Each step is a program with a time limit (benchmarks/gpu_steps.py). All results are in --out: gpu.json, gpu.log, tiles.json.
The same command goes on: steps that are done are skipped, the others go on with the rows that are missing, and those that
failed come last. That holds after any end, also kill -9. `python -m benchmarks.gpu_report` puts the figures into the docs.

Exit codes: 0 all steps are done; 1 a step failed, and none is left; 2 a bad flag; 3 steps are left; 130 or 143 interrupted.
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

from absl import flags

from benchmarks.gpu_steps import STEPS
from benchmarks.results import UNFINISHED, read_json, write_json
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import parse, run_program, split_overrides
from launch.local import die_with_launcher

ROOT = pathlib.Path(__file__).resolve().parents[1]
TABLE = ROOT / "deepseek_jax" / "kernels" / "tiles.json"  # what the kernels read
ROUNDS = 4  # of steps that were cut off, in the time that others left
LEAST_SECONDS = 3  # with less left no step is begun
ENDING_SECONDS = 2  # from SIGTERM to SIGKILL
DONE, FAILED, CUT_OFF = "done", "failed", "cut off"


def main(argv) -> int:
  values = flags.FlagValues()
  flags.DEFINE_integer("part", None, "1 or 2", lower_bound=1, upper_bound=2, flag_values=values)
  flags.DEFINE_string("out", "runs/gpu", "folder of the results", flag_values=values)
  flags.DEFINE_float("seconds", 280, "after which all is stopped", lower_bound=1, flag_values=values)
  flags.DEFINE_string("topology", None, "what plans are for; default: the GPU at hand", flag_values=values)
  flags.DEFINE_string("commit", None, "of this code, where there is no git", flag_values=values)
  flags.DEFINE_bool("toy", False, "every step at a size of seconds, on any platform", flag_values=values)
  rest, overrides = split_overrides(argv)
  parse(rest, values, __doc__)
  if values.part is None:
    raise ConfigError("--part=1 or --part=2 says which half to run (see --help)")
  driver = Driver(values, overrides)
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, driver.stop)
  code = driver.run(values.seconds)
  again = shlex.join(["python", "-m", "benchmarks.gpu", *argv[1:]])
  for status, names in driver.unfinished().items():
    print(f"{status}: {', '.join(names)}; the same command goes on: {again}")
  print(f"results: {driver.path}")
  return code


class Driver:
  """The steps of a part and their record, {"machine", "toy", "steps": {name: what `_note` writes}}."""

  def __init__(self, values, overrides):
    self._toy, self._started, self._stopped = values.toy, time.monotonic(), None
    self._lock, self._deadline = threading.RLock(), float("inf")
    self._out = pathlib.Path(values.out).resolve()
    self._out.mkdir(parents=True, exist_ok=True)
    self.path, here = self._out / "gpu.json", machine()
    self._commit = values.commit or commit()
    self._record = read_json(self.path) or {"machine": here, "toy": values.toy, "steps": {}}
    there, here = (told(*of) for of in ((self._record["machine"], self._record["toy"]), (here, values.toy)))
    if there != here:
      raise ConfigError(f"{self.path} is of {there}, and this is {here}: give another --out")
    topology = values.topology or topology_of(self._record["machine"]["chip"]) or ("h100" if values.toy else None)
    self._fields = {"out": str(self._out), "topology": topology, "attention": attention()}
    self._overrides = [f"--config.{path}={value}" for path, value in overrides.items()]
    self._steps = [step for step in STEPS if step.part == values.part and (topology or not step.beside)]

  def run(self, seconds) -> int:
    """Runs what is not done, for `seconds` at most. Returns the exit code."""
    self._deadline = self._started + seconds
    left = sorted((s for s in self._steps if self._status(s) != DONE), key=lambda s: self._status(s) == FAILED)
    beside = threading.Thread(target=self._rounds, args=([s for s in left if s.beside],), daemon=True)
    beside.start()
    self._rounds([step for step in left if not step.beside])
    beside.join()
    if self._stopped:
      return 128 + self._stopped
    left = self.unfinished()
    return UNFINISHED if set(left) - {FAILED} else int(bool(left))

  def unfinished(self):
    """{status: names of the steps of this part that have it}, but those that are done."""
    found = {}
    for step in self._steps:
      if (status := self._status(step)) != DONE:
        found.setdefault(status, []).append(step.name)
    return found

  def stop(self, number, frame):
    """Ends all, as a signal asks for."""
    self._stopped = number

  def _rounds(self, steps):
    for _ in range(ROUNDS):
      for i, step in enumerate(steps):
        left, later = self._deadline - time.monotonic(), sum(s.seconds for s in steps[i + 1 :])
        if self._stopped or left < LEAST_SECONDS:
          return
        self._execute(step, min(max(step.seconds, left - later), left))
      steps = [step for step in steps if self._status(step) == CUT_OFF]

  def _status(self, step):
    """Of the last run of the same command; "not run"."""
    entry = self._record["steps"].get(step.name, {})
    return entry["status"] if entry and entry["arguments"] == self._template(step) else "not run"

  def _template(self, step):
    """The command, with what changes from call to call left open."""
    fixed = {name: self._fields[name] for name in ("topology", "attention")}
    added = (*(step.toy if self._toy else ()), *(self._overrides if step.trained else ()))
    return [argument.format_map(Open(fixed)) for argument in (*step.command, *added)]

  def _execute(self, step, limit):
    """Runs a step for `limit` seconds at most, and records how it ended with what it had written."""
    result = self._out / f"{step.name}.json"
    previous = self._restore(step, result)
    self._install_tiles()
    fields = {"out": str(self._out), "json": str(result), "seconds": f"{limit - min(15, limit / 3):.0f}"}
    command = [argument.format_map(fields) for argument in self._template(step)]
    self._print(f"== {step.name}, {limit:.0f} s at most: python {shlex.join(command)}")
    started, date = time.monotonic(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    self._note(step, CUT_OFF, None, 0.0, date, command, previous)  # should this process be killed
    code = self._process([sys.executable, *command], step.environment, started + limit)
    status, took = {0: DONE, UNFINISHED: CUT_OFF, None: CUT_OFF}.get(code, FAILED), time.monotonic() - started
    self._print(f"== {step.name}: {status}, exit code {code}, {took:.0f} s")
    content = None
    with contextlib.suppress(ConfigError):  # a program may write its results in place: cut short they are worth nothing
      content = read_json(result)
    self._note(step, status, code, took, date, command, content)
    result.unlink(missing_ok=True)  # few files are to come back from a machine

  def _restore(self, step, result):
    """Lays out at `result` what the step had written before, for it to go on with, and returns what the record has of it.

    The file itself is there if a call was killed, and then it is the newest. What another command wrote is removed.
    """
    entry = self._record["steps"].get(step.name)
    if not entry or entry["arguments"] != self._template(step):
      result.unlink(missing_ok=True)
      return None
    if entry["result"] is not None and not result.exists():
      write_json(result, entry["result"])
    return entry["result"]

  def _note(self, step, status, code, seconds, date, command, result):
    with self._lock:
      self._record["steps"][step.name] = {
        "status": status, "exit_code": code, "seconds": round(seconds, 1), "date": date, "commit": self._commit,
        "command": shlex.join(["python", *command]), "arguments": self._template(step), "result": result,
      }  # fmt: skip
      write_json(self.path, self._record)

  def _process(self, command, environment, deadline):
    """The exit code of a program in a process group of its own, or None if it was stopped."""
    process = subprocess.Popen(
      command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **environment}, start_new_session=True,
      preexec_fn=die_with_launcher, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
      errors="replace",
    )  # fmt: skip
    reader = threading.Thread(target=lambda: [self._print(line.rstrip("\n")) for line in process.stdout], daemon=True)
    reader.start()
    while process.poll() is None and time.monotonic() < deadline and not self._stopped:
      time.sleep(0.05)
    code = process.poll()
    for number, patience in ((signal.SIGTERM, ENDING_SECONDS), (signal.SIGKILL, ENDING_SECONDS)):
      with contextlib.suppress(ProcessLookupError):  # none of the group is left
        os.killpg(process.pid, number)
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    reader.join(1)
    return code

  def _print(self, line):
    with self._lock:
      print(line, flush=True)
      with open(self._out / "gpu.log", "a", encoding="utf-8") as f:
        f.write(line + "\n")

  def _install_tiles(self):
    """Has the kernels use the tiles that were measured."""
    if not self._toy:
      with self._lock:
        merge_tiles(self._out / "tiles.json", TABLE)


class Open(dict):
  """Fields of a format string; those that are missing stay as they are."""

  def __missing__(self, name):
    return f"{{{name}}}"


def machine() -> dict:
  """What figures depend on."""
  on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
  found = {"chip": "cpu" if on_cpu else None, "driver": None, "memory": None}
  if not on_cpu:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
      query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
      lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
      found = dict(zip(found, (text.strip() for text in lines[0].split(",")), strict=True))
  if not found["chip"]:
    asked = [sys.executable, "-c", "import jax; print(jax.devices()[0].device_kind)"]
    found["chip"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "no device"
  versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
  return found | versions | {"python": platform.python_version(), "cpus": os.cpu_count()}


def told(machine, toy):
  """In words, what steps of one record have in common."""
  return f"{machine['chip']}, jax {machine['jax']}, {'with' if toy else 'without'} --toy"


def commit():
  """Of the checkout, with -dirty where files other than the tiles differ from it; None where there is no git."""
  git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
  with contextlib.suppress(OSError, subprocess.SubprocessError):
    name = git(["git", "rev-parse", "--short=7", "HEAD"]).stdout.strip()
    changed = git(["git", "status", "--porcelain", "--untracked-files=no", "--", ".", f":!{TABLE.relative_to(ROOT)}"])
    return name + ("-dirty" if changed.stdout else "")


def topology_of(chip):
  """The name of a GPU in deepseek_jax.plan, or None."""
  match = re.search(r"\b(A100|H100|H200|H800|B200)\b", chip)
  return match and match[1].lower()


def attention():
  """What plans are to take attention for: a kernel where the library is installed that has it."""
  return "pallas" if importlib.util.find_spec("tokamax") else "auto"


def merge_tiles(source, target):
  """Adds the tiles of one file to another: operation -> chip -> sizes."""
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
