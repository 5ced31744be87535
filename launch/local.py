"""Runs one command as several processes of this machine, which live and end together:

  python launch/local.py --processes=2 -- python -m deepseek_jax.train --config=tiny --config.mesh.fsdp=2

JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID tell each process which one it is. Each has --devices
devices: virtual ones on a CPU, GPUs of its own on a machine with GPUs. Lines that process N > 0 prints start with [N].
An error that several of them report is shown once. When a process fails, the others get SIGTERM, and SIGKILL 5 s later;
its exit code is the launcher's, and its last lines are shown again where many lines of others follow them. Ctrl-C and SIGTERM are passed on, so that a training run can save.
"""

import argparse
import collections
import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Sequence

KILL_AFTER_SECONDS = 5  # after a failure, from SIGTERM to SIGKILL
LAST_LINES = 20


def main(argv: Sequence[str]) -> int:
  """Returns the exit code: 0, or that of the first process that failed, 128 + N where signal N ended it."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--processes", type=int, required=True, help="how many")
  parser.add_argument("--devices", type=int, default=1, help="devices of each process (default 1)")
  parser.add_argument("--grace", type=float, default=60, help="seconds to save after Ctrl-C or SIGTERM (default 60)")
  parser.add_argument("command", nargs="+", help="after --: what each process runs")
  options = parser.parse_args(argv)
  if min(options.processes, options.devices) < 1:
    parser.error(f"--processes and --devices are 1 or more, got {options.processes} and {options.devices}")
  group = ProcessGroup(options.grace)
  coordinator = f"127.0.0.1:{free_port()}"
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, group.stop)
  try:
    for index in range(options.processes):
      group.start(options.command, environment(coordinator, options.processes, index, options.devices))
    return group.wait()
  except OSError as error:
    print(f"launch: cannot run {options.command[0]}: {error.strerror}", file=sys.stderr)
    return 2
  finally:
    group.kill()


def environment(coordinator: str, processes: int, index: int, devices: int) -> dict[str, str]:
  """The environment of process `index`. By its number of devices this package sizes XLA's thread pool."""
  device_ids = range(index * devices, (index + 1) * devices)
  return os.environ | {
    "JAX_COORDINATOR_ADDRESS": coordinator,
    "JAX_NUM_PROCESSES": str(processes),
    "JAX_PROCESS_ID": str(index),
    "JAX_NUM_CPU_DEVICES": str(devices),
    "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, device_ids)),  # of the machine's GPUs
  }


def free_port() -> int:
  """A port that was free a moment ago."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


class ProcessGroup:
  """Processes that end together. Each has its own session, so that signals reach it only through this class.

  grace: seconds that the processes have to save after a signal.
  """

  def __init__(self, grace: float):
    self._grace = grace
    self._deadline = float("inf")  # of time.monotonic(), when all that still run are killed
    self._stopped = False
    self._processes: list[subprocess.Popen] = []

  def start(self, command: Sequence[str], environment: dict[str, str]) -> None:
    """Adds a process that runs `command`."""
    first = not self._processes
    process = subprocess.Popen(
      command,
      env=environment,
      start_new_session=True,
      preexec_fn=die_with_launcher,
      stdin=subprocess.DEVNULL,
      stdout=None if first else subprocess.PIPE,  # None: a progress bar finds its terminal
      stderr=subprocess.PIPE if first else subprocess.STDOUT,
    )
    self._processes.append(process)

  def wait(self) -> int:
    """Waits for all and returns the exit code. One that fails, or a stop that takes too long, ends all."""
    transcript = Transcript()
    readers = [OutputReader(process, index, transcript) for index, process in enumerate(self._processes)]
    failed = None
    while True:
      running = [process for process in self._processes if process.poll() is None]
      if failed is None:
        failed = next((index for index, process in enumerate(self._processes) if process.returncode), None)
        if failed is not None:
          self._signal(signal.SIGTERM)
          self._deadline = min(self._deadline, time.monotonic() + KILL_AFTER_SECONDS)
      if not running:
        break
      if time.monotonic() > self._deadline:
        self.kill()
      time.sleep(0.02)
    for reader in readers:
      reader.join(1)  # a grandchild may hold the pipe open
    if failed is None:
      return 0
    code = self._processes[failed].returncode
    code = 128 - code if code < 0 else code
    if not self._stopped:
      far_above = transcript.lines - readers[failed].last_shown > LAST_LINES
      last_lines = b"".join(readers[failed].last_lines).decode(errors="replace") if far_above else ""
      print(
        f"launch: process {failed} failed with exit code {code}{'; its last lines:' if last_lines else ''}",
        file=sys.stderr,
      )
      sys.stderr.write(last_lines)
    return code

  def stop(self, number: int, frame: types.FrameType | None) -> None:
    """Signal handler: passes the signal on and sets the deadline. A second signal kills all at once."""
    self._deadline = float("-inf") if self._stopped else time.monotonic() + self._grace
    self._stopped = True
    self._signal(number)

  def kill(self) -> None:
    """Kills the processes that are left, and the children of all."""
    self._signal(signal.SIGKILL, also_ended=True)

  def _signal(self, number: int, also_ended: bool = False) -> None:
    for process in self._processes:
      if also_ended or process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(process.pid, number)


class Transcript:
  """What was shown on stderr. An error that is one that was shown, or has it inside, is left out.

  lines: how many were shown.
  """

  # As deepseek_jax prints errors: with the number of the process that prints it, and of the one that raised it.
  ERROR = re.compile(rb"(?:process \d+: )?error: (?:process \d+: )?(.+)")

  def __init__(self):
    self.lines = 0
    self._errors: list[bytes] = []
    self._lock = threading.Lock()

  def show(self, line: bytes, prefix: bytes) -> None:
    """Shows a line, with a prefix, unless it is an error that was shown."""
    with self._lock:
      if match := self.ERROR.match(line):
        if any(error in match[1] or match[1] in error for error in self._errors):
          return
        self._errors.append(match[1])
      self.lines += 1
      sys.stderr.buffer.write(prefix + line)
      sys.stderr.buffer.flush()


class OutputReader(threading.Thread):
  """Copies the output of process `index` to `transcript`, with [index] before each line of any but process 0.

  last_lines: the newest lines, as bytes. last_shown: how many lines the transcript had after the newest.
  """

  def __init__(self, process: subprocess.Popen, index: int, transcript: Transcript):
    super().__init__(daemon=True)
    self.last_shown = 0
    self._transcript = transcript
    self.last_lines: collections.deque[bytes] = collections.deque(maxlen=LAST_LINES)
    self._prefix = b"[%d] " % index if index else b""
    self._stream = process.stdout or process.stderr
    self.start()

  def run(self) -> None:
    for line in self._stream:
      self.last_lines.append(line)
      self._transcript.show(line, self._prefix)
      self.last_shown = self._transcript.lines


_libc = ctypes.CDLL(None)  # before the fork


def die_with_launcher() -> None:
  """Runs in a new process: on Linux it is killed when the thread that started it ends."""
  if sys.platform == "linux":
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: even kill -9 of the launcher leaves nobody behind


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
