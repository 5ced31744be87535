"""What processes do when they do not meet, or not all of them get to the end."""

import contextlib
import os
import socket
import subprocess
import sys
import time

import pytest

from deepseek_jax import distributed
from deepseek_jax.console import SilentConsole, set_console
from deepseek_jax.distributed import barrier, broadcast_from_process0, distributed_session, gather_to_host
from deepseek_jax.errors import DataError, Stopped

PROGRAM = """
import os, sys, time
from deepseek_jax import distributed
from deepseek_jax.errors import DataError
from deepseek_jax.processes import find_initialize_args
import jax
import numpy as np
distributed.CONNECT_SECONDS = int(os.environ.get("CONNECT_SECONDS", 120))
with distributed.distributed_session(find_initialize_args(sys.argv[1], 2, int(sys.argv[2]))):
  me = jax.process_index()
  print("joined")
  assert distributed.broadcast_from_process0(lambda: [5 + me, None]) == [5, None]
  mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
  x = jax.make_array_from_callback((2,), jax.NamedSharding(mesh, jax.P("d")), lambda i: np.arange(2)[i])
  assert distributed.gather_to_host(x).tolist() == [0, 1]
  exec(sys.argv[3])
print("the end of", me, file=sys.stderr)
"""


@pytest.fixture
def coordinator():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{s.getsockname()[1]}"


def start(coordinator, index, body=""):
  command = [sys.executable, "-c", PROGRAM, coordinator, str(index), body]
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def both(coordinator, body):
  """[(exit code, stdout, stderr)] of two processes, and the seconds that passed until both were gone."""
  pair = [start(coordinator, i, body) for i in range(2)]
  assert pair[0].stdout.readline()
  started = time.monotonic()
  ends = [process.communicate(timeout=100) for process in pair]
  return [(p.returncode, *texts) for p, texts in zip(pair, ends, strict=True)], time.monotonic() - started


@pytest.mark.parametrize(
  ("error", "code", "text"),
  [
    (KeyError("a mistake"), 1, "Traceback"),
    (DataError("no such file"), 2, "error: no such file"),
    (Stopped("SIGTERM", 143), 143, "stopped by SIGTERM"),
    (KeyboardInterrupt(), 130, "interrupted"),
  ],
)
def test_an_error_that_ends_the_process_reaches_stderr_although_the_console_is_silent(
  monkeypatch, capsys, error, code, text
):
  def connect(arguments):
    raise error

  codes = []
  monkeypatch.setattr(distributed, "_connect", connect)
  monkeypatch.setattr(distributed, "exit_process", codes.append)
  monkeypatch.setattr(distributed, "_PROPAGATION_SECONDS", 0)
  with set_console(SilentConsole()), contextlib.suppress(RuntimeError), distributed_session({}):
    pass
  assert codes == [code] and text in capsys.readouterr().err


def test_a_process_alone_starts_nothing():
  with distributed_session(None):
    assert broadcast_from_process0(lambda: 3) == 3
    assert gather_to_host([1, 2]).tolist() == [1, 2]
    barrier("place")
  with pytest.raises(KeyError), distributed_session(None):
    raise KeyError


def test_processes_meet_agree_and_end(coordinator):
  ((code, out, err), (code_1, out_1, err_1)), _ = both(coordinator, "distributed.barrier('place'); print('here')")
  assert (code, code_1) == (0, 0), err + err_1
  assert "here" in out and "here" not in out_1
  assert "the end of 0" in err and "the end of 1" in err_1


@pytest.mark.parametrize(
  ("index", "error", "code"), [(0, "DataError", 2), (1, "DataError", 2), (1, "KeyboardInterrupt", 130)]
)
def test_an_error_ends_the_one_that_waits_with_the_same_code(coordinator, index, error, code):
  body = f"""
if me == {index}:
  raise {error}("no such thing")
distributed.barrier("a place that one never comes to")
"""
  ends, seconds = both(coordinator, body)
  assert [end[0] for end in ends] == [code, code], ends
  assert seconds < 20
  message = "error: no such thing" if code == 2 else "interrupted"
  assert f"{'process 1: ' if index else ''}{message}\n" in ends[index][2]
  assert f"error: process {index} failed (" in ends[1 - index][2]
  assert "Traceback" not in ends[0][2] + ends[1][2]


def test_what_process_0_raises_all_raise(coordinator):
  body = """
for _ in range(2):
  try:
    distributed.broadcast_from_process0(lambda: (_ for _ in ()).throw(DataError(f"none at {me}")))
  except DataError as error:
    print("caught:", error, file=sys.stderr)
"""
  ((code, _, err), (code_1, _, err_1)), _ = both(coordinator, body)
  assert (code, code_1) == (0, 0), err + err_1
  assert err.count("caught: none at 0\n") == 2 and err_1.count("caught: process 0: none at 0\n") == 2


def test_a_port_that_is_taken_is_an_error(coordinator):
  with socket.create_server(("127.0.0.1", int(coordinator.rpartition(":")[2]))):
    process = start(coordinator, 0)
    _, err = process.communicate(timeout=100)
  assert process.returncode == 2
  assert "cannot listen at port" in err and "Address already in use; give another --coordinator" in err, err


def test_a_process_whose_others_never_come_says_so(coordinator, monkeypatch):
  monkeypatch.setenv("CONNECT_SECONDS", "2")
  process = start(coordinator, 1)
  _, err = process.communicate(timeout=100)
  assert process.returncode == 1
  assert f"error: the processes of this run did not connect within 2 s (coordinator: {coordinator})" in err
