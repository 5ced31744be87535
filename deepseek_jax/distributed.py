"""Several processes as one run: connect, broadcast from process 0, share values, barrier, and a joint exit.

In a run of one process all of this does nothing.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed as _jax_distributed  # the client has no public name
from jax.experimental import multihost_utils

from deepseek_jax import errors
from deepseek_jax.console import Console, SilentConsole, current_console
from deepseek_jax.errors import ConfigError, Stopped, UserError

CONNECT_SECONDS = 120
HEARTBEAT_SECONDS = 30  # a lost process is noticed after this time
SHUTDOWN_SECONDS = 60  # at the end, the first process waits this long for the last
_FAILURE_KEY = "deepseek_jax/failed"
_broadcast_ids = itertools.count()  # all processes broadcast in the same order, so that their counts agree
_DAY_MS = 86_400_000
_PROPAGATION_SECONDS = 1  # until every process has read a failure from the key-value store
HANG_EXIT_CODE = 42
# Called with the exit code in a process that another one's failure ends.
_before_exit: list[Callable[[int], None]] = []


@contextlib.contextmanager
def distributed_session(initialize_args: dict[str, Any] | None) -> Iterator[None]:
  """Connects to the other processes of the run while the block lasts. Only process 0 writes to stdout.

  An exception is shown on the current console, or on stderr where that is a SilentConsole. It ends this process, and
  within seconds all others, with one exit code: 2 for a UserError, 130 for Ctrl-C, 143 for SIGTERM and other
  notices of preemption, else 1. jax by itself would wait at its exit for the others, while they wait for this one in a step.

  Args:
    initialize_args: arguments of `jax.distributed.initialize`, from `processes.find_initialize_args`. None: a single
      process, and nothing happens.
  """
  if initialize_args is None:
    yield
    return
  try:
    watcher = _connect(initialize_args)
    yield
    jax.distributed.shutdown()  # waits for all, and ends the watcher's call
    watcher.join(10)  # a thread inside of a call when Python ends would abort the process
  except BaseException as error:
    _abort_all(error)


def _connect(initialize_args: dict[str, Any]) -> threading.Thread:
  """Runs `jax.distributed.initialize` and returns the thread that watches for failures of other processes."""
  if initialize_args.get("process_id") == 0:
    _check_port_is_free(initialize_args["coordinator_address"])
  # jax's handler would swallow SIGTERM.
  jax.config.update("jax_enable_preemption_service", False)
  # jax's own timeout prints a C++ stack trace; this one fires first.
  console = current_console()  # that of another thread is not set
  timeout = threading.Timer(CONNECT_SECONDS, _exit_unconnected, [console, initialize_args])
  timeout.daemon = True
  timeout.start()
  jax.distributed.initialize(
    **initialize_args,
    heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    initialization_timeout=2 * CONNECT_SECONDS,
  )
  timeout.cancel()
  if _jax_distributed.global_state.process_id:
    sys.stdout = open(os.devnull, "w", encoding="utf-8")
  watcher = threading.Thread(target=_watch_for_failures, args=[console], daemon=True)
  watcher.start()
  return watcher


def _check_port_is_free(coordinator: str) -> None:
  """Raises ConfigError where process 0 cannot listen at its port: jax 0.12 crashes on that."""
  port = coordinator.rpartition(":")[2]
  try:
    socket.create_server(("", int(port))).close()
  except OSError as error:
    raise ConfigError(
      f"process 0 cannot listen at port {port}: {os.strerror(error.errno or 0)}; give another --coordinator"
    ) from None


def _exit_unconnected(console: Console, initialize_args: dict[str, Any]) -> None:
  coordinator = initialize_args.get("coordinator_address", "the scheduler's")
  print_error(
    f"error: the processes of this run did not connect within {CONNECT_SECONDS} s (coordinator: {coordinator}): "
    "start all of them, with one coordinator that all can reach and whose port is free",
    audible(console),
  )
  os._exit(1)  # not 2: a host may only be late, and a restart finds it


def _client() -> Any:
  """jax's client of the coordinator and its key-value store; None in a single process."""
  return _jax_distributed.global_state.client


def _watch_for_failures(console: Console) -> None:
  """Ends this process when another one has failed: the main thread may wait for that one in a collective forever."""
  try:
    failed, code, reason = json.loads(_client().blocking_key_value_get(_FAILURE_KEY, 365 * _DAY_MS))
  except jax.errors.JaxRuntimeError:
    return  # the run is over
  if failed != _jax_distributed.global_state.process_id:
    print_error(f"error: process {failed} failed ({reason}): all end", audible(console))
    try:
      for callback in _before_exit:
        callback(code)
    finally:
      exit_process(code)


@contextlib.contextmanager
def before_exit(callback: Callable[[int], None]) -> Iterator[None]:
  """Calls `callback` with the exit code, in the watching thread, if another process's failure ends this one in the block."""
  _before_exit.append(callback)
  try:
    yield
  finally:
    _before_exit.remove(callback)


def tell_failure(code: int, reason: str) -> None:
  """Tells the other processes that this one has failed: they end with the same exit code."""
  client, process_id = _client(), _jax_distributed.global_state.process_id
  if client:
    client.key_value_set(_FAILURE_KEY, json.dumps([process_id, code, reason]), allow_overwrite=True)


def _abort_all(error: BaseException) -> None:
  """Shows `error`, tells the other processes, and ends this one."""
  reason = f"{type(error).__name__}: {error}".splitlines()[0]
  if isinstance(error, UserError):
    code, text = 2, f"error: {error}"
  elif isinstance(error, KeyboardInterrupt):
    code, text = (error.exit_code, str(error)) if isinstance(error, Stopped) else (130, "interrupted")
    reason = text
  else:
    code, text = 1, "".join(traceback.format_exception(error))
    # The cause may be another process's end. Then the watcher reads it from the store and reports it.
    time.sleep(_PROPAGATION_SECONDS)
  print_error(text, audible(current_console()))
  try:
    tell_failure(code, reason)
  finally:
    exit_process(code)


def audible(console: Console) -> Console:
  """`console`, or one on stderr for a SilentConsole: its caller never sees an exception that ends the process."""
  return Console() if isinstance(console, SilentConsole) else console


def print_error(text: str, console: Console) -> None:
  """Shows `text` on `console` as an error; each line starts with the process's number, except on process 0."""
  process_id = _jax_distributed.global_state.process_id
  prefix = f"process {process_id}: " if process_id else ""
  console.print("\n".join(prefix + line for line in text.splitlines()), err=True)


def exit_process(code: int) -> None:
  """Ends this process at once, whatever its other threads do, after what it wrote to stdout and stderr is out."""
  sys.stdout.flush()
  sys.stderr.flush()
  if _jax_distributed.global_state.process_id == 0:
    time.sleep(_PROPAGATION_SECONDS)  # the key-value store is in this process: let the others read it first
  os._exit(code)


def process_count() -> int:
  """Number of processes of the run. Unlike jax.process_count() this opens no device."""
  return _jax_distributed.global_state.num_processes or 1


def process_index() -> int:
  """Number of this process in the run. Unlike jax.process_index() this opens no device."""
  return _jax_distributed.global_state.process_id or 0


def barrier(name: str) -> None:
  """Waits until all processes have called this, at most a day. Each barrier of a run needs its own `name`."""
  if jax.process_count() > 1:
    _client().wait_at_barrier(f"deepseek_jax/{name}", _DAY_MS)


def broadcast_from_process0(compute: Callable[[], Any]) -> Any:
  """Calls `compute()` on process 0 and returns its result on every process. All processes have to call this.

  The result must be JSON. A UserError of `compute` is raised on every process. It may take a day: the other processes
  wait at jax's key-value store and not in a collective, which would time out.
  """
  store = _client()
  if store is None:
    return compute()
  key = f"deepseek_jax/broadcast/{next(_broadcast_ids)}"
  if _jax_distributed.global_state.process_id:  # jax.process_index() would open the devices
    error_type, result = json.loads(store.blocking_key_value_get(key, _DAY_MS))
    if error_type:
      raise getattr(errors, error_type)(f"process 0: {result}")
    return result
  try:
    result = compute()
  except UserError as error:
    store.key_value_set(key, json.dumps([type(error).__name__, str(error)]))
    raise
  store.key_value_set(key, json.dumps([None, result]))
  return result


def share(name: str, value: Any) -> None:
  """Shows `value`, of JSON, to the other processes as this one's newest `name`. It takes a request, and no device."""
  if client := _client():
    client.key_value_set(f"deepseek_jax/{name}/{process_index()}", json.dumps(value), allow_overwrite=True)


def shared(name: str) -> dict[int, Any]:
  """{process: its newest value of `name`} of those that have called `share`; {} in a single process."""
  client = _client()
  pairs = client.key_value_dir_get(f"deepseek_jax/{name}/") if client else []
  return {int(key.rpartition("/")[2]): json.loads(value) for key, value in pairs}


def host_names() -> list[str]:
  """The name of each process's machine, in the order of processes. All processes have to call this."""
  store, name = _client(), socket.gethostname()
  if store is None:
    return [name]
  store.key_value_set(f"deepseek_jax/host/{process_index()}", name, allow_overwrite=True)
  return [store.blocking_key_value_get(f"deepseek_jax/host/{i}", _DAY_MS) for i in range(process_count())]


def gather_to_host(array: jax.typing.ArrayLike) -> np.ndarray:
  """The global `array` as NumPy on every process; all-gathered where needed. All processes have to call this."""
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    array = multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(array)
