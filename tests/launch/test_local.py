"""The launcher, with commands that cost nothing."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

LAUNCHER = pathlib.Path(__file__).parents[2] / "launch" / "local.py"


def launch(program, *options):
  command = [sys.executable, LAUNCHER, *options, "--", sys.executable, "-u", "-c", PRELUDE + program]
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


PRELUDE = """
import os, signal, sys, time
index = int(os.environ["JAX_PROCESS_ID"])
def note(name):
  open(os.path.join(os.environ["NOTES"], f"{name}.{index}"), "w").write(str(os.getpid()))
"""


@pytest.fixture
def notes(tmp_path, monkeypatch):
  """A folder for notes of the processes; a function that waits for one and reads it."""
  monkeypatch.setenv("NOTES", str(tmp_path))

  def read(name, timeout=60):
    deadline = time.monotonic() + timeout
    while not (tmp_path / name).exists() or not (tmp_path / name).read_text():
      assert time.monotonic() < deadline, name
      time.sleep(0.01)
    return int((tmp_path / name).read_text())

  return read


def ended(pid, timeout=20):
  """Whether the process is gone, or only waits for its parent to ask how it ended, within `timeout` seconds."""
  deadline = time.monotonic() + timeout
  while time.monotonic() < deadline:
    try:
      state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
      return True
    if state == "Z":
      return True
    time.sleep(0.02)
  return False


def finish(process, code):
  out, err = process.communicate(timeout=100)
  assert process.returncode == code, out + err
  return out, err


def test_each_process_has_its_place_and_what_they_print_is_told_apart():
  program = """
print("out", index, *(os.environ["JAX_" + name] for name in ("NUM_PROCESSES", "NUM_CPU_DEVICES", "LOCAL_DEVICE_IDS")))
print("err", index, file=sys.stderr)
print(os.environ["JAX_COORDINATOR_ADDRESS"].rsplit(":", 1)[0], file=sys.stderr)
"""
  out, err = finish(launch(program, "--processes=2", "--devices=2"), 0)
  assert out == "out 0 2 2 0,1\n"
  assert sorted(err.splitlines()) == ["127.0.0.1", "[1] 127.0.0.1", "[1] err 1", "[1] out 1 2 2 2,3", "err 0"]


@pytest.mark.parametrize("index", [0, 1])
def test_the_first_that_fails_ends_all_with_its_lines_and_its_code(notes, index):
  program = f"""
if index == {index}:
  print("the reason", file=sys.stderr)
  sys.exit(7)
note("alive")
time.sleep(100)
"""
  started = time.monotonic()
  _, err = finish(launch(program, "--processes=2"), 7)
  assert f"launch: process {index} failed with exit code 7\n" in err and err.count("the reason") == 1
  assert time.monotonic() - started < 20


def test_an_error_of_all_processes_is_shown_once(notes):
  """As a config error that each finds by itself, one that process 0 tells the others, and the end that others see."""
  program = """
while index and not os.path.exists(os.environ["NOTES"] + f"/said.{index - 1}"): time.sleep(0.01)
told = "process 0: " if index == 2 else ""
text = "process 0 failed (ConfigError: model.x=3 is bad: use 4): all end" if index == 3 else "model.x=3 is bad: use 4"
print(f"process {index}: " * bool(index) + f"error: {told}{text}", file=sys.stderr)
note("said")
while not os.path.exists(os.environ["NOTES"] + "/said.3"): time.sleep(0.01)
time.sleep(index)
sys.exit(2)
"""
  signal_ignored = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
  _, err = finish(launch(signal_ignored + program, "--processes=4"), 2)
  assert err.count("model.x=3 is bad: use 4") == 1 and err.count("\n") == 2
  assert err.endswith("\nlaunch: process 0 failed with exit code 2\n")


def test_other_errors_and_lines_are_all_shown(notes):
  program = """
while index and not os.path.exists(os.environ["NOTES"] + "/said.0"): time.sleep(0.01)
print(f"error: of {index} alone\\nsame line", file=sys.stderr)
note("said")
"""
  _, err = finish(launch(program, "--processes=2"), 0)
  expected = ["[1] error: of 1 alone", "[1] same line", "error: of 0 alone", "same line"]
  assert sorted(err.splitlines()) == expected


def test_last_lines_far_above_are_shown_again(notes):
  program = """
signal.signal(signal.SIGTERM, lambda *_: (print("\\n" * 30, file=sys.stderr), sys.exit(143)))
if index == 1:
  while not os.path.exists(os.environ["NOTES"] + "/ready.0"): time.sleep(0.01)
  print("the reason", file=sys.stderr)
  sys.exit(7)
note("ready")
time.sleep(100)
"""
  _, err = finish(launch(program, "--processes=2"), 7)
  assert err.endswith("launch: process 1 failed with exit code 7; its last lines:\nthe reason\n")


def test_who_does_not_obey_is_killed_and_so_are_children(notes):
  program = """
import subprocess
if index == 0:
  while not os.path.exists(os.environ["NOTES"] + "/child.1"): time.sleep(0.01)
  os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, lambda *_: note("asked"))
child = subprocess.Popen(["sleep", "100"])
open(os.environ["NOTES"] + "/child.1", "w").write(str(child.pid))
while True: time.sleep(0.1)
"""
  started = time.monotonic()
  _, err = finish(launch(program, "--processes=2"), 128 + signal.SIGKILL)
  assert 5 < time.monotonic() - started < 40
  assert "process 0 failed with exit code 137" in err
  assert notes("asked.1") and ended(notes("child.1"))


WAITS = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
note("ready")
while True: time.sleep(0.1)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_passed_on(notes, number, code):
  process = launch(WAITS, "--processes=2")
  pids = [notes("ready.0"), notes("ready.1")]
  process.send_signal(number)
  _, err = finish(process, code)
  assert all(map(ended, pids)) and "failed" not in err


def test_the_grace_after_a_signal_ends(notes):
  process = launch(
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); note('ready'); time.sleep(100)", "--processes=2", "--grace=0.5"
  )
  pids = [notes("ready.0"), notes("ready.1")]
  process.terminate()
  finish(process, 137)
  assert all(map(ended, pids))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell children of their parent's death")
def test_a_launcher_that_is_killed_leaves_nobody_behind(notes):
  process = launch(WAITS, "--processes=2")
  pids = [notes("ready.0"), notes("ready.1")]
  process.kill()
  process.communicate(timeout=60)
  assert all(map(ended, pids))


def test_all_start_again_with_a_coordinator_of_their_own(notes):
  program = """
first = not os.path.exists(os.environ["NOTES"] + f"/first.{index}")
open(os.environ["NOTES"] + "/coordinators", "a").write(os.environ["JAX_COORDINATOR_ADDRESS"] + " ")
note("first" if first else "second")
if index == 1 and first:
  while not os.path.exists(os.environ["NOTES"] + "/first.0"): time.sleep(0.01)
  sys.exit(42)
if first: time.sleep(100)
"""
  _, err = finish(launch(program, "--processes=2", "--max_restarts=1", "--backoff=0.1"), 0)
  assert "process 1 failed with exit code 42" in err and "restart 1 of 1 in 0 s" in err
  assert ended(notes("first.0")) and notes("first.0") != notes("second.0")
  first, same, second, last = (pathlib.Path(os.environ["NOTES"]) / "coordinators").read_text().split()
  assert first == same != second == last


@pytest.mark.parametrize(("code", "options"), [(2, ["--max_restarts=3"]), (42, [])])
def test_exit_code_2_and_a_launcher_without_a_budget_end_at_the_first_failure(notes, code, options):
  program = f"note(len(os.listdir(os.environ['NOTES']))); sys.exit({code})"
  finish(launch(program, "--processes=1", "--backoff=0", *options), code)
  assert os.listdir(os.environ["NOTES"]) == ["0.0"]


def test_a_signal_to_the_launcher_is_the_end_despite_a_budget(notes):
  process = launch(WAITS, "--processes=2", "--max_restarts=3")
  notes("ready.0"), notes("ready.1")
  process.terminate()
  _, err = finish(process, 143)
  assert "restart" not in err


def test_a_command_that_is_not_there_and_numbers_that_are_none():
  command = [sys.executable, LAUNCHER, "--processes=2", "--", "no-such-program"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=60)
  assert done.returncode == 2 and "cannot run no-such-program: No such file" in done.stderr
  done = subprocess.run([*command[:2], "--processes=0", "--", "true"], capture_output=True, text=True, timeout=60)
  assert done.returncode == 2 and "--processes and --devices are 1 or more" in done.stderr
  assert not os.environ.get("JAX_PROCESS_ID")
