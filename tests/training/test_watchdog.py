"""A hang ends all processes with their stacks, and nothing else does."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from deepseek_jax.config_sections import WatchdogConfig
from deepseek_jax.console import Console, SilentConsole
from deepseek_jax.storage import RunFolder
from deepseek_jax.training import watchdog
from deepseek_jax.training.clock import PHASES, PhaseClock
from deepseek_jax.training.watchdog import Watchdog, describe_processes

# A loop that has finished some steps, and then runs the code of its arguments.
PROGRAM = """
import ctypes, os, sys, time
from deepseek_jax.config_sections import WatchdogConfig
from deepseek_jax.console import current_console
from deepseek_jax.distributed import distributed_session
from deepseek_jax.processes import find_initialize_args
from deepseek_jax.storage import RunFolder
from deepseek_jax.training import watchdog
from deepseek_jax.training.clock import PhaseClock
folder, coordinator, processes, index, body = sys.argv[1:]
def wait_for_a_batch():
  time.sleep(100)
clock = PhaseClock()
with distributed_session(find_initialize_args(coordinator, int(processes), int(index)) if coordinator else None):
  import jax
  from jax.experimental import multihost_utils
  if coordinator:
    multihost_utils.process_allgather(jax.numpy.ones(1))  # compiles it
  dog = watchdog.Watchdog(WatchdogConfig(step_seconds=1.0), clock, RunFolder(folder), current_console())
  if "://" not in folder:
    dog.publish = lambda step, what: print("published", step, what, file=sys.stderr)
  with dog.watch(), clock.measure("step"):
    for step in range(3):
      clock.finish_step(step + 1)
    exec(body)
"""
DATA = "with clock.measure('data'):\n  wait_for_a_batch()"


def start(folder, body, coordinator="", processes=1, index=0):
  arguments = [str(folder), coordinator, str(processes), str(index), body]
  return subprocess.Popen(
    [sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
  )  # fmt: skip


def ends(processes, code):
  errors = [process.communicate(timeout=150)[1] for process in processes]
  assert [process.returncode for process in processes] == [code] * len(processes), errors
  return errors


def stacks(folder):
  return {path.name.partition(".")[2]: path.read_text() for path in (folder / "hangs").iterdir()}


def test_a_loop_that_waits_forever_ends_with_its_stacks_and_one_line_and_a_stopped_process_does_not(tmp_path):
  body = (
    "print('ready', flush=True)\nfor _ in range(10):\n  time.sleep(0.1)\n  clock.tick()\nprint('goes on', flush=True)\n"
  )
  process = start(tmp_path, body + DATA)
  assert process.stdout.readline() == "ready\n"
  process.send_signal(signal.SIGSTOP)
  time.sleep(3)
  process.send_signal(signal.SIGCONT)
  assert process.stdout.readline() == "goes on\n"
  (err,) = ends([process], 42)
  lines = [line for line in err.splitlines() if line.startswith("error: ")]
  assert len(lines) == 1 and "published 3 hang: no progress" in err
  assert (
    lines[0].startswith("error: hang: no progress for 1") and "limit 1 s, after step 3: waiting for the" in lines[0]
  )
  path = lines[0].rpartition(" ")[2]
  (text,) = stacks(tmp_path).values()
  assert open(path).read() == text and path.endswith(".process_0.txt")
  assert text.index("(the loop of the run)") < text.index("in wait_for_a_batch") < text.index("watchdog\n")


def test_where_one_process_does_not_enter_the_step_all_write_their_stacks_and_it_is_named(tmp_path):
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    coordinator = f"127.0.0.1:{s.getsockname()[1]}"
  collective = """
with clock.measure("device"):
  multihost_utils.process_allgather(jax.numpy.ones(1))
"""
  pair = [start(tmp_path, (collective, DATA)[i], coordinator, 2, i) for i in range(2)]
  errors = ends(pair, 42)
  assert "hang: process 1: waiting for the next batch; process 0: waiting for the device" in errors[0]
  assert sum("error: hang: no progress" in err for err in errors) >= 1
  texts = stacks(tmp_path)
  assert "process_allgather" in texts["process_0.txt"] and "in wait_for_a_batch" in texts["process_1.txt"]


@pytest.mark.chaos
def test_the_stacks_of_a_run_in_a_bucket_are_uploaded(buckets):
  (err,) = ends([start("gs://bucket-a/run", DATA)], 42)
  ((name, stacks),) = buckets.objects["bucket-a"].items()
  assert name.startswith("run/hangs/") and name.endswith(".process_0.txt") and name.rpartition("/")[2] in err
  assert b"in wait_for_a_batch" in stacks.content


@pytest.mark.chaos
def test_where_no_python_thread_can_run_the_interpreter_s_own_timer_ends_the_process(tmp_path):
  body = "watchdog.FROZEN_SECONDS = 1.5\ntime.sleep(0.5)\nctypes.PyDLL(None).sleep(60)  # keeps the interpreter's lock"
  (err,) = ends([start(tmp_path, body)], 1)
  assert "Timeout (0:00:01.500000)!" in err and 'File "<string>", line ' in err


@pytest.fixture
def fires(monkeypatch, tmp_path):
  """A function: (what happens at each poll, fields of the config) -> (phase, still) of the hang, or None."""

  def fires(polls, step_seconds=10.0, steps=(1.0,) * 3, phase="device", thread=None):
    now = [500.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *a, **k: None)
    clock, events = PhaseClock(), iter(polls)
    clock.step_seconds.extend(steps)
    dog = Watchdog(WatchdogConfig(step_seconds=step_seconds), clock, RunFolder(tmp_path), SilentConsole())
    dog._loop_thread = thread or dog._loop_thread
    fired = []

    class Event:
      def wait(self, poll):
        seconds, does = next(events, (None, None))
        now[0] += seconds or 0
        if does:
          does(clock)
        return seconds is None or bool(fired)

    dog._stopped = Event()
    monkeypatch.setattr(dog, "_fire", lambda *hang: fired.append(hang))
    with clock.measure(phase):
      dog._run()
    monkeypatch.undo()
    return fired[0] if fired else None

  return fires


def test_a_hang_is_no_progress_for_ten_median_steps_and_the_floor(fires):
  assert fires([(1.0, None)] * 10) is None
  assert fires([(1.0, None)] * 11) == ("device", 11.0)
  assert fires([(1.0, None)] * 50, steps=(5.0, 5.0, 90.0)) is None
  assert fires([(1.0, None)] * 51, steps=(5.0, 5.0, 90.0)) == ("device", 51.0)


def test_progress_starts_the_count_again(fires):
  assert fires([(1.0, lambda clock: clock.tick())] * 100) is None
  polls = ([(1.0, None)] * 9 + [(1.0, lambda clock: clock.tick())]) * 5
  assert fires(polls) is None


def test_the_first_steps_of_a_program_have_the_limit_of_its_compilation(fires):
  assert fires([(1.0, None)] * 1000, steps=(1.0, 1.0)) is None
  assert fires([(1.0, None)] * 3601, steps=()) == ("device", 3601.0)


def test_time_in_which_the_machine_did_not_run_does_not_count(fires):
  """A laptop that slept an hour at every poll; a clock that was set back."""
  assert fires([(3600.0, None)] * 4) is None
  assert fires([(-3600.0, None)] + [(1.0, None)] * 9) is None


def test_a_debugger_is_no_hang(fires):
  done = threading.Event()

  def debugged():
    sys.settrace(lambda frame, event, argument: None)
    sys._getframe().f_trace = lambda *_: None  # as pdb sets it
    done.wait(20)

  thread = threading.Thread(target=debugged)
  thread.start()
  while not watchdog.is_traced(thread):
    pass
  assert fires([(1.0, None)] * 100, thread=thread) is None
  done.set()
  thread.join()


@pytest.mark.parametrize(
  ("phase", "field"),
  [
    ("init", "start"), ("open_data", "data"), ("compile", "compile"), ("restore", "restore"), ("eval", "eval"),
    ("sample", "eval"), ("checkpoint", "checkpoint"),
  ],
)  # fmt: skip
def test_each_other_phase_has_a_limit_of_its_own(tmp_path, phase, field):
  config = dataclasses.replace(WatchdogConfig(), **{f"{field}_seconds": 77.0})
  assert Watchdog(config, PhaseClock(), RunFolder(tmp_path), Console()).limit(phase) == 77
  assert set(watchdog.WORDS) == set(PHASES)


def test_a_limit_of_zero_is_no_watchdog(tmp_path):
  before = threading.active_count()
  with Watchdog(WatchdogConfig(step_seconds=0.0), PhaseClock(), RunFolder(tmp_path), Console()).watch():
    assert threading.active_count() == before


def test_what_the_loop_raises_while_a_hang_ends_the_process_does_not_end_it_first(tmp_path):
  left = []

  def loop():
    dog = Watchdog(WatchdogConfig(), PhaseClock(), RunFolder(tmp_path), Console())
    with contextlib.suppress(RuntimeError), dog.watch():
      dog._has_fired.acquire()
      raise RuntimeError("connection closed by peer")
    left.append(True)

  thread = threading.Thread(target=loop, daemon=True)
  thread.start()
  thread.join(0.5)
  assert thread.is_alive() and not left


def test_a_disk_that_hangs_as_well_leaves_the_stacks_on_stderr(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(watchdog, "STACKS_SECONDS", 0.05)
  monkeypatch.setattr(os, "makedirs", lambda *a, **k: time.sleep(1))
  dog = Watchdog(WatchdogConfig(), PhaseClock(), RunFolder(tmp_path), Console())
  assert dog._save_stacks("hang: no progress") == "above"
  err = capsys.readouterr().err
  assert "hang: no progress" in err and "in test_a_disk_that_hangs_as_well_leaves_the_stacks_on_stderr" in err


def test_processes_are_named_by_what_they_do_and_those_that_wait_come_last():
  phases = {process: "device" for process in range(12)} | {3: "data", 5: "checkpoint"}
  del phases[7]
  assert describe_processes(phases, 12) == (
    "process 5: saving a checkpoint; process 3: waiting for the next batch; "
    "processes 0, 1, 2, 4, 6, 8, 9, 10 and 1 more: waiting for the device, or there for another process; process 7: no answer"
  )
