"""Files in buckets: gs://BUCKET/PATH and s3://BUCKET/PATH, by TensorStore's drivers, which need no further package.

Orbax 0.12.8 takes gs:// by way of gcsfs and google-cloud-storage, with credentials and endpoints of their own and
retries without bounds, and has no s3://. So everything here goes through TensorStore: one set of credentials
(application default, AWS's chain), endpoints (TENSORSTORE_GCS_HTTP_URL, AWS_ENDPOINT_URL) and retries for arrays and
files alike.

An object appears complete, in one step. There is no rename: a marker is written after the objects that it marks.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import re
import shutil
import tempfile
import threading
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import tensorstore as ts

from deepseek_jax.errors import StorageError
from deepseek_jax.native_logs import hide_native_logs

# A request is tried five times, 1, 2, 4 and 8 s apart and up to a second more, each until nothing has moved for 10 s,
# which curl notices up to 6 s late: an outage is an error after 19 s where connections are refused, after 100 where
# they hang.
RETRIES = {"max_retries": 4, "initial_delay": "1s", "max_delay": "8s"}
_CURL = {"CONNECT_TIMEOUT_SECONDS": "10", "LOW_SPEED_TIME_SECONDS": "10", "LOW_SPEED_LIMIT_BYTES": "1"}
for _name, _value in _CURL.items():
  os.environ.setdefault(f"TENSORSTORE_CURL_{_name}", _value)  # read once, at the first request

_NO_VALUE = b"\x02"  # TensorStore's generation of a key without a value
_URL = re.compile(r"(gs|s3)://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(?:/(.*))?", re.DOTALL)
_REMEDIES = {
  "PERMISSION_DENIED": "check the credentials (gcloud auth application-default login; AWS_ACCESS_KEY_ID or "
  "AWS_PROFILE) and that they may list, read and, for a run, write and delete there",
  "UNAUTHENTICATED": "check the credentials",
  "NOT_FOUND": "check the name of the bucket",
}

Result = TypeVar("Result")


def is_url(path: str | os.PathLike) -> bool:
  """Whether `path` looks like a URL; whether it is a valid one, ObjectStore checks."""
  return "://" in str(path)


def is_safe_name(name: str) -> bool:
  """Whether an object's `name` is a path that stays inside a folder when it is written there."""
  return bool(name) and not name.startswith("/") and "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def describe_error(error: Exception) -> str:
  """The first line of one of TensorStore's errors, without its annotations, and what the user can do."""
  first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
  line = re.split(r" \[\w+='", first_line)[0]
  remedy = next((text for status, text in _REMEDIES.items() if status in line), "check the network and the endpoint")
  return f"{line:.400}; {remedy}"


class ObjectStore:
  """The objects below `url`, by names relative to it. Every method raises StorageError where the bucket refuses."""

  def __init__(self, url: str | os.PathLike):
    self.url = str(url).rstrip("/")
    self._context = ts.Context({"gcs_request_retries": RETRIES, "s3_request_retries": RETRIES})
    self._base = self._kvstore_spec()
    self._is_connected = False
    self._objects = self._wait("opened", lambda: ts.KvStore.open(self._base, context=self._context))

  def read(self, name: str) -> bytes | None:
    """The bytes of an object; None where there is none."""
    return self.read_if_changed(name, None)[0]

  def read_if_changed(self, name: str, generation: str | None) -> tuple[bytes | None, str | None]:
    """(bytes, generation in hex) of an object; (None, generation) if it is unchanged; (None, None): no object."""
    not_equal = bytes.fromhex(generation) if generation else None
    result = self._wait("read", lambda: self._objects.read(name, if_not_equal=not_equal), name)
    content = result.value if result.state == "value" else None
    return content, None if result.state == "missing" else result.stamp.generation.hex()

  def write(self, name: str, content: bytes) -> None:
    """Writes an object, or replaces it."""
    self._wait("written", lambda: self._objects.write(name, content), name)

  def write_if_absent(self, name: str, content: bytes) -> None:
    """As `write`, but raises StorageError where there is an object with other content."""
    stamp = self._wait("written", lambda: self._objects.write(name, content, if_equal=_NO_VALUE), name)
    # A request whose answer was lost may have written the object, and makes its retry fail.
    if not stamp.generation and self.read(name) != content:
      raise StorageError(f"{self.url}/{name} was written by another process meanwhile: one run at a time has a workdir")

  def list_names(self, prefix: str = "") -> list[str]:
    """Names of all objects that start with `prefix`, sorted.

    Lists that GCS refuses (401, 403, no such bucket) come back empty from TensorStore, or end early.
    """
    names = self._wait("listed", lambda: self._objects.list(_key_range(prefix)), prefix)
    return sorted(name.decode() for name in names)

  def exists(self, name: str) -> bool:
    """Whether there is an object `name`: by a list, because a read would transfer all of it."""
    # Only names with a space or a control character after `name` come between the two ends of this range.
    key_range = ts.KvStore.KeyRange(name, f"{name}!")
    return name.encode() in self._wait("listed", lambda: self._objects.list(key_range), name)

  def delete(self, name: str) -> None:
    """Deletes one object, if it is there."""
    self._wait("deleted", lambda: self._objects.write(name, None), name)

  def delete_prefix(self, prefix: str) -> None:
    """Deletes all objects whose names start with `prefix`."""
    self._wait("deleted", lambda: self._objects.delete_range(_key_range(prefix)), prefix)

  def kvstore(self, name: str) -> tuple[dict[str, Any], ts.Context]:
    """(TensorStore's spec of the folder `name` as a key-value store, context that bounds its retries)."""
    return self._base | {"path": f"{self._base['path']}{name}/"}, self._context

  def _wait(self, action: str, start: Callable[[], Any], name: str = "") -> Any:
    """The result of the future that `start` returns. `action`: the participle for the error message."""
    # While it connects, the library logs where it looks for credentials.
    hide = contextlib.nullcontext() if self._is_connected else hide_native_logs()
    try:
      with hide:
        result = start().result()
      self._is_connected = action != "opened"  # which sends nothing yet
      return result
    except (ValueError, RuntimeError) as error:  # what TensorStore raises for every status
      raise StorageError(f"{self.url}/{name} cannot be {action}: {describe_error(error)}") from None

  def _kvstore_spec(self) -> dict[str, Any]:
    matched = _URL.fullmatch(self.url)
    if not matched or (matched[3] and not is_safe_name(matched[3])):
      raise StorageError(f"{self.url} is not a place in a bucket: expected gs://BUCKET/PATH or s3://BUCKET/PATH")
    scheme, bucket, path = matched[1], matched[2], f"{matched[3]}/" if matched[3] else ""
    if scheme == "gs":
      return {"driver": "gcs", "bucket": bucket, "path": path}
    environment = os.environ
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": path}
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if endpoint := environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL"):
      spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
      spec |= {"aws_region": region}
    if environment.get("AWS_ACCESS_KEY_ID"):  # the default chain complains about files that need not exist
      spec |= {"aws_credentials": {"type": "environment"}}
    return spec


def _key_range(prefix: str) -> ts.KvStore.KeyRange:
  """The keys that start with `prefix`."""
  if not prefix:
    return ts.KvStore.KeyRange()
  first_after = prefix[:-1] + chr(ord(prefix[-1]) + 1)
  return ts.KvStore.KeyRange(prefix, first_after)


class RunFolder:
  """Local folder for a run's small files.

  `path` is `workdir` itself, or for a URL a temporary folder that `upload` copies.

  Objects cannot be appended to: a file that has changed is uploaded in full.
  """

  def __init__(self, workdir: str | os.PathLike):
    self.path = str(workdir)
    self._store: ObjectStore | None = None
    self._uploaded: dict[pathlib.Path, tuple[int, int]] = {}  # of `_version`: as in the bucket
    if is_url(workdir):
      self._store, self.path = ObjectStore(workdir), tempfile.mkdtemp(prefix="deepseek_jax-")
      weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

  def download(self, names: Iterable[str]) -> None:
    """Downloads those of the files `names` that exist, so that they can be appended to. Nothing for a local workdir.

    Raises StorageError for a bucket that cannot be read, or not be written.
    """
    if not self._store:
      return
    probe = f".probe-{uuid.uuid4().hex[:8]}"
    self._store.write(probe, b"")
    self._store.delete(probe)
    for name in names:
      content = self._store.read(name)
      if content is not None:
        path = pathlib.Path(self.path, name)
        path.write_bytes(content)
        self._uploaded[path] = _version(path)  # as it was, it must not replace what another process wrote since

  def upload(self) -> None:
    """Uploads files that are new or have changed. Nothing for a local workdir."""
    if not self._store:
      return
    for path in sorted(pathlib.Path(self.path).rglob("*")):
      version = _version(path)
      if path.is_file() and self._uploaded.get(path) != version:
        self._store.write(path.relative_to(self.path).as_posix(), path.read_bytes())
        self._uploaded[path] = version


def _version(path: pathlib.Path) -> tuple[int, int]:
  """(size, modification time in ns) of a file."""
  status = path.stat()
  return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def local_copy(folder: str, names: Iterable[str]) -> Iterator[str]:
  """Yields `folder`, or where it is a URL a temporary folder with those of its files `names` that exist.

  Nothing is written to the bucket. Raises StorageError for one that cannot be read.
  """
  if not is_url(folder):
    yield folder
    return
  store = ObjectStore(folder)
  with tempfile.TemporaryDirectory(prefix="deepseek_jax-") as copy:
    for name in names:
      if (content := store.read(name)) is not None:
        pathlib.Path(copy, name).write_bytes(content)
    yield copy


def map_parallel(function: Callable[[str], Result], names: Sequence[str]) -> dict[str, Result]:
  """{name: function(name)}, four at a time. After an error no more calls start, so that an outage is waited for once.

  Raises what `function` raises.
  """
  failed = threading.Event()

  def call(name: str) -> Result | None:
    if not failed.is_set():
      try:
        return function(name)
      except Exception:
        failed.set()
        raise
    return None  # never seen: `map` raises the error of another call

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    return dict(zip(names, pool.map(call, names), strict=True))  # type: ignore[arg-type]


def read_object(url: str) -> bytes | None:
  """The bytes of the object at `url`; None where there is none."""
  folder, _, name = url.rpartition("/")
  return ObjectStore(folder).read(name)
