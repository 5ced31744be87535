"""Runs a command, and runs it again after an exit code that a restart may mend:

  python launch/supervise.py --max_restarts=20 -- python -m deepseek_jax.train --config=67b --workdir=gs://BUCKET/67b

No restart follows exit code 0 (finished), 2 (something that you have to mend), 43 (a device that computes wrong) or 130
(Ctrl-C), nor a signal that this program itself gets. SIGINT, SIGTERM and SIGUSR1 are passed on, so that a training run
can save; a signal that comes a second time kills. Its exit code is that of the command, 128 + N where signal N ended it.
With --requeue a scheduler starts everything again, and this program only asks it to.
"""

import argparse
import contextlib
import ctypes
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence

NO_RESTART = frozenset({0, 2, 43, 130})
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
KILL_AFTER_SECONDS = 5  # after a failure, from SIGTERM to SIGKILL
# Hosts of a TPU slice restart by themselves, and have to meet within distributed.CONNECT_SECONDS, which is 120.
MAX_BACKOFF_SECONDS = 60


def main(argv: Sequence[str]) -> int:
  """Returns the exit code of the last attempt; 2 where the arguments are wrong or the command cannot be started."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add_restart_flags(parser, max_restarts=20)
  parser.add_argument(
    "--count_file", type=pathlib.Path, help="keeps the count of restarts for supervisors that a scheduler starts anew"
  )
  parser.add_argument("--requeue", type=shlex.split, help="run this in place of a restart, and end")
  parser.add_argument("command", nargs="+", help="after --: what to run")
  options = parser.parse_args(argv)
  restarts = make_restarts(parser, options, options.count_file)
  with StopSignals() as signals:

    def attempt() -> int:
      group = ProcessGroup(options.grace, signals)
      try:
        group.start(options.command)
        failed = group.wait()
        return failed[1] if failed else 0
      finally:
        group.kill()

    try:
      return supervise(attempt, restarts, signals, options.requeue)
    except OSError as error:
      print(f"supervise: cannot run {error.filename}: {error.strerror}", file=sys.stderr)
      return 2


def add_restart_flags(parser: argparse.ArgumentParser, max_restarts: int) -> None:
  """Defines --max_restarts with that default, --reset_after, --backoff and --grace."""
  add = parser.add_argument
  add("--max_restarts", type=int, default=max_restarts, help=f"restarts in a row (default {max_restarts})")
  add(
    "--reset_after",
    type=float,
    default=3600,
    help="an attempt of so many seconds gives all restarts back (default 3600): choose it longer than the time between "
    "checkpoints, so that such an attempt has saved one",
  )
  add(
    "--backoff",
    type=float,
    default=10,
    help=f"seconds before the first restart, doubled for each further one in a row, up to {MAX_BACKOFF_SECONDS} (default 10)",
  )
  add("--grace", type=float, default=60, help="seconds to save after a signal, then SIGKILL (default 60)")


class Restarts:
  """How often a command may be started again, and how long to wait before that.

  limit, reset_after, backoff: as the flags. count_file: its restarts in a row so far are read from there and kept there.
  """

  def __init__(self, limit: int, reset_after: float, backoff: float, count_file: pathlib.Path | None = None):
    self.limit = limit
    self._reset_after = reset_after
    self._backoff = backoff
    self._file = count_file
    self.count = int(count_file.read_text()) if count_file and count_file.exists() else 0

  def delay(self, seconds: float) -> float | None:
    """Counts a restart after an attempt of `seconds`. Returns the seconds until it; None if none is left."""
    if seconds >= self._reset_after:
      self.count = 0
    if self.count >= self.limit:
      return None
    self.count += 1
    if self._file:
      unfinished = self._file.with_name(self._file.name + ".tmp")
      unfinished.write_text(f"{self.count}\n")
      unfinished.replace(self._file)
    return min(self._backoff * 2 ** (self.count - 1), MAX_BACKOFF_SECONDS)


def make_restarts(
  parser: argparse.ArgumentParser, options: argparse.Namespace, count_file: pathlib.Path | None = None
) -> Restarts:
  """Restarts as the flags say. Values that cannot be end the program with a line and exit code 2."""
  for name in ("max_restarts", "reset_after", "backoff", "grace"):
    if getattr(options, name) < 0:
      parser.error(f"--{name} is 0 or more, got {getattr(options, name)}")
  try:
    return Restarts(options.max_restarts, options.reset_after, options.backoff, count_file)
  except (OSError, ValueError) as error:
    parser.error(f"--count_file={count_file} is to hold a number ({error}): delete it to count from 0")


class StopSignals:
  """SIGINT, SIGTERM and SIGUSR1, noted while the block lasts, and passed on to the processes of `group`."""

  def __init__(self) -> None:
    self.received: list[int] = []
    self.group: ProcessGroup | None = None

  def __enter__(self) -> "StopSignals":
    for number in STOP_SIGNALS:
      signal.signal(number, self._handle)
    return self

  def __exit__(self, *exception: object) -> None:
    for number in STOP_SIGNALS:
      signal.signal(number, signal.SIG_DFL)

  def _handle(self, number: int, frame: types.FrameType | None) -> None:
    again = number in self.received
    self.received.append(number)
    if self.group:
      self.group.stop(number, at_once=again)

  def wait(self, seconds: float) -> None:
    """Sleeps, until a signal comes at the latest."""
    deadline = time.monotonic() + seconds
    while not self.received and time.monotonic() < deadline:
      time.sleep(0.05)


def supervise(
  attempt: Callable[[], int], restarts: Restarts, signals: StopSignals, requeue: Sequence[str] | None = None
) -> int:
  """Calls `attempt` until its exit code, a signal or `restarts` says that it is the last one. Returns its exit code.

  requeue: a command that is run in place of a further attempt.
  """
  while True:
    started = time.monotonic()
    code = attempt()
    seconds = time.monotonic() - started
    if signals.received or code in NO_RESTART:
      if code == 2 and restarts.limit:
        say("no restart after exit code 2: mend what the error names, then start the same command again")
      return code
    delay = restarts.delay(seconds)
    if delay is None:
      if restarts.limit:
        say(
          f"exit code {code}, and none of {restarts.limit} restarts in a row is left: read the log, or give --max_restarts=N"
        )
      return code
    if requeue:
      say(
        f"exit code {code} after {seconds:.0f} s, restart {restarts.count} of {restarts.limit}: {shlex.join(requeue)}"
      )
      if failed := subprocess.run(requeue).returncode:
        say(f"{shlex.join(requeue)} failed with exit code {failed}: submit the job again, it resumes")
      return code
    say(f"exit code {code} after {seconds:.0f} s, restart {restarts.count} of {restarts.limit} in {delay:.0f} s")
    signals.wait(delay)
    if signals.received:
      return 128 + signals.received[0]


def say(text: str) -> None:
  """Shows a line on stderr."""
  print(f"supervise: {text}", file=sys.stderr, flush=True)


class ProcessGroup:
  """Processes that end together. Each has its own session, so that signals reach it only through this class.

  grace: seconds that the processes have to save after a signal. signals: those that are passed on to the processes.
  """

  def __init__(self, grace: float, signals: StopSignals):
    self.processes: list[subprocess.Popen] = []
    self._grace = grace
    self._deadline = float("inf")  # of time.monotonic(), when all that still run are killed
    self._signals = signals
    signals.group = self

  def start(
    self,
    command: Sequence[str],
    env: Mapping[str, str] | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
  ) -> None:
    """Adds a process that runs `command`. stdout and stderr are as subprocess.Popen takes them."""
    self.processes.append(
      subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
        start_new_session=True, preexec_fn=die_with_launcher,
      )
    )  # fmt: skip

  def wait(self) -> tuple[int, int] | None:
    """Waits for all. One that fails, or a stop that takes too long, ends all.

    Returns (index, exit code) of the first process that failed, 128 + N where signal N ended it; None if none did.
    """
    for number in self._signals.received:  # while the processes were started
      self.stop(number)
    failed = None
    while True:
      running = [process for process in self.processes if process.poll() is None]
      if failed is None:
        failed = next((index for index, process in enumerate(self.processes) if process.returncode), None)
        if failed is not None:
          self._signal(signal.SIGTERM)
          self._deadline = min(self._deadline, time.monotonic() + KILL_AFTER_SECONDS)
      if not running:
        break
      if time.monotonic() > self._deadline:
        self.kill()
      time.sleep(0.02)
    if failed is None:
      return None
    code = self.processes[failed].returncode
    return failed, 128 - code if code < 0 else code

  def stop(self, number: int, at_once: bool = False) -> None:
    """Passes a signal on and gives the processes the grace time; at_once: kills them."""
    self._deadline = float("-inf") if at_once else min(self._deadline, time.monotonic() + self._grace)
    self._signal(number)

  def kill(self) -> None:
    """Kills the processes that are left, and the children of all."""
    self._signal(signal.SIGKILL, also_ended=True)

  def _signal(self, number: int, also_ended: bool = False) -> None:
    for process in self.processes:
      if also_ended or process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(process.pid, number)


_libc = ctypes.CDLL(None)  # before the fork


def die_with_launcher() -> None:
  """Runs in a new process: on Linux it is killed when the thread that started it ends."""
  if sys.platform == "linux":
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: even kill -9 of the launcher leaves nobody behind


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
