"""Several processes as one run: how they meet, agree, and end together. A process alone starts nothing of this."""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback

import jax
import numpy as np
from jax._src import distributed as _jax  # there is no public name for the client, the processes' notice board
from jax.experimental import multihost_utils

from deepseek_jax import errors
from deepseek_jax.errors import ConfigError, UserError

MEET_SECONDS = 120
# How long a process that is lost goes unnoticed, and how long the first at the end waits for the last.
TIMEOUTS = {"heartbeat_timeout_seconds": 30, "shutdown_timeout_seconds": 60}
_FAILED = "deepseek_jax/failed"
_SAID = itertools.count()  # all processes ask in one order, and so count alike
_DAY_MS, _ECHO_SECONDS = 86_400_000, 1  # the second: how long the news takes to all who hear it


@contextlib.contextmanager
def distributed_session(place):
  """Joins the other processes of the run for the block: `place` as `processes.find_place` gives it; None: nothing happens.

  An exception is printed, and ends this process and within seconds all others with one exit code: 2 for a UserError, 130
  for Ctrl-C, else 1. jax by itself would wait at its exit for the others, while they wait for this one in a step.
  Only process 0 writes to stdout.
  """
  if place is None:
    yield
    return
  try:
    watcher = _start(place)
    yield
    jax.distributed.shutdown()  # waits for all, and ends the watcher's call
    watcher.join(10)  # a thread inside of a call when Python ends would abort the process
  except BaseException as error:
    _end_all(error)


def _start(place) -> threading.Thread:
  if place.get("process_id") == 0:
    _check_free(place["coordinator_address"])
  # jax's handler would swallow SIGTERM.
  jax.config.update("jax_enable_preemption_service", False)
  late = threading.Timer(MEET_SECONDS, _end_unmet, [place])  # jax's own timeout ends in a page of C++
  late.daemon = True
  late.start()
  jax.distributed.initialize(**place, **TIMEOUTS, initialization_timeout=2 * MEET_SECONDS)
  late.cancel()
  if _jax.global_state.process_id:
    sys.stdout = open(os.devnull, "w", encoding="utf-8")
  watcher = threading.Thread(target=_watch, daemon=True)
  watcher.start()
  return watcher


def _check_free(coordinator):
  """Raises ConfigError where process 0 cannot listen at its port: jax 0.12 crashes on that."""
  port = coordinator.rpartition(":")[2]
  try:
    socket.create_server(("", int(port))).close()
  except OSError as error:
    raise ConfigError(
      f"process 0 cannot listen at port {port}: {os.strerror(error.errno)}; give another --coordinator"
    ) from None


def _end_unmet(place):
  where = place.get("coordinator_address", "the scheduler's")
  print(
    f"error: the processes of this run did not meet within {MEET_SECONDS} s (coordinator: {where}): start all of them, "
    "with one coordinator that all can reach and whose port is free",
    file=sys.stderr,
    flush=True,
  )
  os._exit(2)


def _watch():
  """Ends this process when another one says that it has failed: the main thread may be waiting for that one for good."""
  state = _jax.global_state
  try:
    failed, code, why = json.loads(state.client.blocking_key_value_get(_FAILED, 365 * _DAY_MS))
  except jax.errors.JaxRuntimeError:
    return  # the run is over
  if failed != state.process_id:
    print_error(f"error: process {failed} failed ({why}): all end")
    _exit(code)


def _end_all(error):
  code = 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
  if code == 1:
    time.sleep(_ECHO_SECONDS)  # it may be the echo of another process's end, of which the watcher hears and tells
  brief = "interrupted" if code == 130 else f"{type(error).__name__}: {error}".splitlines()[0]
  text = f"error: {error}" if code == 2 else brief if code == 130 else "".join(traceback.format_exception(error))
  print_error(text)
  state = _jax.global_state
  try:
    if state.client:
      state.client.key_value_set(_FAILED, json.dumps([state.process_id, code, brief]), allow_overwrite=True)
  finally:
    _exit(code)


def print_error(text):
  """Prints `text` to stderr, on another process than the first behind its number."""
  number = _jax.global_state.process_id
  prefix = f"process {number}: " if number else ""
  print("\n".join(prefix + line for line in text.splitlines()), file=sys.stderr, flush=True)


def _exit(code):
  sys.stdout.flush()
  sys.stderr.flush()
  if _jax.global_state.process_id == 0:
    time.sleep(_ECHO_SECONDS)  # the board is in this process: the others read it first
  os._exit(code)


def process_count() -> int:
  """Processes of the run. Unlike jax.process_count() this opens no device."""
  return _jax.global_state.num_processes or 1


def barrier(what):
  """Returns when all processes have come to the place in the program that alone is called `what`; within a day."""
  if jax.process_count() > 1:
    _jax.global_state.client.wait_at_barrier(f"deepseek_jax/{what}", _DAY_MS)


def broadcast_from_process0(make):
  """What `make()`, which process 0 alone calls, gives there, on every process: what JSON can hold. All have to call this.

  A UserError that it raises, all raise. It may take a day: the others wait at the notice board, not in a collective, which
  would time out.
  """
  board = _jax.global_state.client
  if board is None:
    return make()
  key = f"deepseek_jax/said/{next(_SAID)}"
  if _jax.global_state.process_id:  # jax.process_index() would open the devices
    error, said = json.loads(board.blocking_key_value_get(key, _DAY_MS))
    if error:
      raise getattr(errors, error)(f"process 0: {said}")
    return said
  try:
    said = make()
  except UserError as error:
    board.key_value_set(key, json.dumps([type(error).__name__, str(error)]))
    raise
  board.key_value_set(key, json.dumps([None, said]))
  return said


def to_host(array) -> np.ndarray:
  """The whole `array` on every process; all of them have to call this."""
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    array = multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(array)
