"""Notices of Google Cloud that a machine is about to go, which its metadata server has and no signal brings.

- `maintenance-event` is TERMINATE_ON_HOST_MAINTENANCE from 60 s before the machine ends, with GPUs from an hour before.
  After MIGRATE_ON_HOST_MAINTENANCE the machine goes on.
  https://cloud.google.com/compute/docs/gpus/gpu-host-maintenance
- `preempted` is TRUE when a spot machine is about to end, within 30 s.
  https://cloud.google.com/compute/docs/instances/create-use-spot
"""

import contextlib
import http.client
import os
import pathlib
import threading
from collections.abc import Callable, Iterator

from deepseek_jax.console import Console, current_console
from deepseek_jax.distributed import audible, print_error
from deepseek_jax.training.signals import Notice, StopRequest, stop_requests

POLL_SECONDS = 2.0
TIMEOUT_SECONDS = 5.0
WARN_AFTER = 15  # reads in a row that failed
_PRODUCT_NAME = pathlib.Path("/sys/class/dmi/id/product_name")
_HOST = "GCE_METADATA_HOST"  # the variable by which Google's libraries find another server


def is_on_google_cloud() -> bool:
  """Whether this is a machine of Google Cloud, as its firmware says or GCE_METADATA_HOST. Asks no server."""
  try:
    return bool(os.environ.get(_HOST)) or _PRODUCT_NAME.read_text().startswith("Google")
  except OSError:  # not a Linux machine, or one without firmware tables
    return False


@contextlib.contextmanager
def stop_notices(cloud_notices: str) -> Iterator[StopRequest]:
  """Yields what the notices say that come while the block lasts: signals, and as `checkpoint.cloud_notices` says others."""
  with stop_requests() as request, watch_metadata(cloud_notices, request.announce):
    yield request


@contextlib.contextmanager
def watch_metadata(mode: str, announce: Callable[[Notice], None]) -> Iterator[None]:
  """Calls `announce` for notices that come while the block lasts, from a thread that asks every POLL_SECONDS.

  mode: on, off, or auto: where `is_on_google_cloud`.
  """
  if mode == "off" or (mode == "auto" and not is_on_google_cloud()):
    yield
    return
  watcher = _Watcher(announce, current_console())
  watcher.start()
  try:
    yield
  finally:
    watcher.end()


class _Watcher(threading.Thread):
  """A daemon, because a server that does not answer must not keep a run from ending."""

  def __init__(self, announce: Callable[[Notice], None], console: Console):
    super().__init__(name="preemption", daemon=True)
    self._announce, self._console = announce, console
    self._ended, self._lock = threading.Event(), threading.Lock()
    self._reads = self._failures = 0
    self._maintenance_is_old = False

  def end(self) -> None:
    """Calls `announce` no more."""
    with self._lock:
      self._ended.set()

  def run(self) -> None:
    host = os.environ.get(_HOST) or "metadata.google.internal"
    while not self._ended.is_set():
      try:
        preempted, maintenance = read_metadata(host, "preempted"), read_metadata(host, "maintenance-event")
      except (OSError, http.client.HTTPException) as error:
        self._warn_of_failure(host, error)
      else:
        self._failures = 0
        if notice := self._notice(preempted, maintenance):
          with self._lock:
            if not self._ended.is_set():
              self._announce(notice)
          return
      self._ended.wait(POLL_SECONDS)

  def _notice(self, preempted: str, maintenance: str) -> Notice | None:
    """What the two values say. Maintenance that was announced before the run started ends it no more.

    Else a run would stop and start again without an update until the machine ends, up to an hour later.
    """
    self._reads += 1
    if preempted == "TRUE":
      return Notice.PREEMPTED
    is_announced = maintenance == "TERMINATE_ON_HOST_MAINTENANCE"
    if is_announced and self._reads == 1:
      self._maintenance_is_old = True
      self._print(
        "warning: Google Cloud announced maintenance of this machine's host before the run started, which goes on until a "
        "signal comes"
      )
    self._maintenance_is_old &= is_announced
    return Notice.MAINTENANCE if is_announced and not self._maintenance_is_old else None

  def _warn_of_failure(self, host: str, error: Exception) -> None:
    self._failures += 1
    if self._failures == WARN_AFTER:
      self._print(
        f"warning: the metadata server {host} gives no notices of preemption ({error}); the run asks it on. Signals still "
        "stop the run; checkpoint.cloud_notices=off ends this"
      )

  def _print(self, text: str) -> None:
    print_error(text, audible(self._console))


def read_metadata(host: str, key: str) -> str:
  """The value of a `key` of this machine, asked from the metadata server at `host`, HOST or HOST:PORT, without a proxy.

  Raises OSError or http.client.HTTPException where there is no answer, and OSError for an answer that is not the server's.
  """
  connection = http.client.HTTPConnection(host, timeout=TIMEOUT_SECONDS)
  with contextlib.closing(connection):
    connection.request("GET", f"/computeMetadata/v1/instance/{key}", headers={"Metadata-Flavor": "Google"})
    response = connection.getresponse()
    body = response.read(1000)
    if response.status != 200 or response.getheader("Metadata-Flavor") != "Google":
      raise OSError(f"it answers {response.status} {response.reason} to {key}")
    return body.decode("ascii", "replace").strip()
