"""The supervisor, with commands that cost nothing."""

import pathlib
import re
import runpy
import signal
import subprocess
import sys
import time

import pytest

SUPERVISOR = pathlib.Path(__file__).parents[2] / "launch" / "supervise.py"
# Ends with the exit codes of the arguments, one an attempt; -N: by signal N.
ATTEMPTS = """
import os, pathlib, sys, time
count = pathlib.Path("attempts")
count.write_text(count.read_text() + "x" if count.exists() else "x")
code = int(sys.argv[len(count.read_text())])
os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
"""
WAITS = """
import pathlib, signal, sys, time
def end(number, frame):
  pathlib.Path("got").write_text(str(number))
  sys.exit(int(sys.argv[1]))
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
  signal.signal(number, end)
pathlib.Path("ready").touch()
while True: time.sleep(0.05)
"""


def start(folder, *options, program=ATTEMPTS, arguments=()):
  command = [sys.executable, SUPERVISOR, "--backoff=0.01", *options]
  if program:
    command += ["--", sys.executable, "-c", program, *map(str, arguments)]
  return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)


def supervised(folder, *options, **program):
  """(exit code, stderr) of a supervisor."""
  process = start(folder, *options, **program)
  _, err = process.communicate(timeout=60)
  return process.returncode, err


def attempts(folder):
  return len((folder / "attempts").read_text())


@pytest.mark.parametrize(
  ("codes", "code"),
  [
    ([0], 0),
    ([2], 2),
    ([130], 130),
    ([1, 42, 143, -9, 0], 0),  # an error, a hang, preemption, kill -9
    ([1, 2], 2),
    ([42, 130], 130),
  ],
)
def test_exit_codes_that_a_restart_may_mend_are_restarted_and_others_are_not(tmp_path, codes, code):
  returned, err = supervised(tmp_path, arguments=[*codes, 99])
  assert (returned, attempts(tmp_path)) == (code, len(codes)), err
  assert ("no restart after exit code 2: mend what the error names" in err) == (code == 2)


def test_the_budget_ends(tmp_path):
  code, err = supervised(tmp_path, "--max_restarts=2", arguments=[-11, 42, 1, 0])
  assert (code, attempts(tmp_path)) == (1, 3)
  assert re.search(
    r"exit code 139 after \d+ s, restart 1 of 2 in 0 s.*exit code 42 after \d+ s, restart 2 of 2", err, re.S
  )
  assert "exit code 1, and none of 2 restarts in a row is left" in err and "--max_restarts=N" in err


def test_waits_double_and_a_long_attempt_gives_the_budget_back():
  restarts = runpy.run_path(str(SUPERVISOR))["Restarts"](limit=4, reset_after=100, backoff=10)
  assert [restarts.delay(seconds) for seconds in (1, 99, 1, 1, 1)] == [10, 20, 40, 60, None]
  assert [restarts.delay(seconds) for seconds in (100, 1)] == [10, 20]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_and_ends_it_whatever_the_exit_code(tmp_path, number):
  process = start(tmp_path, program=WAITS, arguments=[143])
  wait_for(tmp_path / "ready", process)
  process.send_signal(number)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 143 and (tmp_path / "got").read_text() == str(number.value) and not err


def test_a_signal_between_two_attempts_ends_it(tmp_path):
  process = start(tmp_path, "--backoff=50", arguments=[1, 0])
  assert "restart 1 of 20 in 50 s" in process.stderr.readline()
  process.terminate()
  process.communicate(timeout=60)
  assert (process.returncode, attempts(tmp_path)) == (143, 1)


@pytest.mark.parametrize(("options", "signals"), [(["--grace=0.3"], 1), ([], 2)])
def test_the_grace_ends_and_so_does_patience_at_a_second_signal(tmp_path, options, signals):
  process = start(tmp_path, *options, program=WAITS.replace("sys.exit(int(sys.argv[1]))", "pass"), arguments=[0])
  wait_for(tmp_path / "ready", process)
  process.terminate()
  if signals == 2:
    wait_for(tmp_path / "got", process)
    process.terminate()
  process.communicate(timeout=60)
  assert process.returncode == 137


def test_a_scheduler_starts_it_again_and_the_count_is_kept(tmp_path):
  options = ("--max_restarts=2", "--count_file=count", "--requeue=touch 'asked for'")
  for count in (1, 2):
    code, err = supervised(tmp_path, *options, arguments=[143, 42, 42, 0])
    assert code == (143, 42)[count - 1] and f"restart {count} of 2: touch 'asked for'" in err
    assert (tmp_path / "count").read_text() == f"{count}\n" and attempts(tmp_path) == count
    (tmp_path / "asked for").unlink()
  code, err = supervised(tmp_path, *options, arguments=[143, 42, 42, 0])
  assert code == 42 and "none of 2 restarts" in err and not (tmp_path / "asked for").exists()


def test_a_scheduler_that_refuses_is_named(tmp_path):
  code, err = supervised(tmp_path, "--requeue=false", arguments=[42])
  assert code == 42 and "false failed with exit code 1: submit the job again" in err


@pytest.mark.parametrize(
  ("options", "says"),
  [
    (["--max_restarts=-1"], "--max_restarts is 0 or more, got -1"),
    (["--grace=-2"], "--grace is 0 or more, got -2"),
    (["--count_file=bad"], "--count_file=bad is to hold a number"),
    (["--requeue=no-such-program"], "cannot run no-such-program: No such file"),
  ],
)
def test_what_cannot_be_is_named(tmp_path, options, says):
  (tmp_path / "bad").write_text("many")
  code, err = supervised(tmp_path, *options, arguments=[1])
  assert code == 2 and says in err


def test_a_command_that_is_not_there_and_none(tmp_path):
  command = [sys.executable, SUPERVISOR, "--", "no-such-program"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=60)
  assert done.returncode == 2 and "supervise: cannot run no-such-program: No such file" in done.stderr
  done = subprocess.run(command[:2], capture_output=True, text=True, timeout=60)
  assert done.returncode == 2 and "command" in done.stderr
  done = subprocess.run([*command[:2], "--help"], capture_output=True, text=True, timeout=60)
  assert done.returncode == 0 and "--max_restarts" in done.stdout and "--requeue" in done.stdout


def wait_for(path, process):
  deadline = time.monotonic() + 60
  while not path.exists():
    assert process.poll() is None and time.monotonic() < deadline, path
    time.sleep(0.01)
