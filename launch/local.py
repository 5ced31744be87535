"""Runs one command as several processes of this machine, which live and end together:

  python launch/local.py --processes=2 -- python -m deepseek_jax.train --config=tiny --config.mesh.fsdp=2

JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID tell each process which one it is. Each has --devices
devices: virtual ones on a CPU, GPUs of its own on a machine with GPUs. Lines that process N > 0 prints start with [N].
An error that several of them report is shown once. When a process fails, the others get SIGTERM, and SIGKILL 5 s later;
its exit code is the launcher's, and its last lines are shown again where many lines of others follow them.
SIGINT (Ctrl-C), SIGTERM and SIGUSR1 are passed on, so that a training run can save.
With --max_restarts all are started again after a failure that a restart may mend: launch/supervise.py says which.
"""

import argparse
import collections
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence

from supervise import ProcessGroup, StopSignals, add_restart_flags, make_restarts, supervise

LAST_LINES = 20


def main(argv: Sequence[str]) -> int:
  """Returns the exit code: 0, or that of the first process that failed, 128 + N where signal N ended it."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--processes", type=int, required=True, help="how many")
  parser.add_argument("--devices", type=int, default=1, help="devices of each process (default 1)")
  add_restart_flags(parser, max_restarts=0)
  parser.add_argument("command", nargs="+", help="after --: what each process runs")
  options = parser.parse_args(argv)
  if min(options.processes, options.devices) < 1:
    parser.error(f"--processes and --devices are 1 or more, got {options.processes} and {options.devices}")
  restarts = make_restarts(parser, options)
  with StopSignals() as signals:
    try:
      return supervise(lambda: run_once(options, signals), restarts, signals)
    except OSError as error:
      print(f"launch: cannot run {options.command[0]}: {error.strerror}", file=sys.stderr)
      return 2


def run_once(options: argparse.Namespace, signals: StopSignals) -> int:
  """Starts all processes, waits until all have ended, and returns the exit code. `options` are the flags."""
  group, transcript = ProcessGroup(options.grace, signals), Transcript()
  coordinator = f"127.0.0.1:{free_port()}"
  try:
    for index in range(options.processes):
      # None: a progress bar of process 0 finds its terminal.
      stdout, stderr = (subprocess.PIPE, subprocess.STDOUT) if index else (None, subprocess.PIPE)
      env = environment(coordinator, options.processes, index, options.devices)
      group.start(options.command, env, stdout, stderr)
    readers = [OutputReader(process, index, transcript) for index, process in enumerate(group.processes)]
    failed = group.wait()
    for reader in readers:
      reader.join(1)  # a grandchild may hold the pipe open
  finally:
    group.kill()
  if failed is None:
    return 0
  index, code = failed
  if not signals.received:
    show_failure(readers[index], code, transcript)
  return code


def show_failure(reader: "OutputReader", code: int, transcript: "Transcript") -> None:
  """Says which process failed, with its last lines where they are far above."""
  far_above = transcript.lines - reader.last_shown > LAST_LINES
  last_lines = b"".join(reader.last_lines).decode(errors="replace") if far_above else ""
  print(
    f"launch: process {reader.index} failed with exit code {code}{'; its last lines:' if last_lines else ''}",
    file=sys.stderr,
  )
  sys.stderr.write(last_lines)


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
    self.index = index
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


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
