"""Files in buckets: gs://BUCKET/PATH and s3://BUCKET/PATH, by TensorStore's drivers, which need no further package.

Orbax 0.12.8 takes gs:// by way of gcsfs and google-cloud-storage, with credentials and endpoints of their own and retries
without bounds, and has no s3://. So everything here goes through TensorStore: one set of credentials (application default,
AWS's chain), endpoints (TENSORSTORE_GCS_HTTP_URL, AWS_ENDPOINT_URL) and retries for arrays and files alike.

Objects are written whole and at once, and have no rename: what counts as a marker is written after what it marks.
"""

import concurrent.futures
import os
import pathlib
import re
import shutil
import tempfile
import threading
import uuid
import weakref

import tensorstore as ts

from deepseek_jax.errors import StorageError

# A request is tried five times, 1, 2, 4 and 8 s apart and up to a second more, each until nothing has moved for 10 s, which
# curl notices up to 6 s late: an outage is an error after 19 s where connections are refused, after 100 where they hang.
RETRIES = {"max_retries": 4, "initial_delay": "1s", "max_delay": "8s"}
_CURL = {"CONNECT_TIMEOUT_SECONDS": "10", "LOW_SPEED_TIME_SECONDS": "10", "LOW_SPEED_LIMIT_BYTES": "1"}
for _name, _value in _CURL.items():
  os.environ.setdefault(f"TENSORSTORE_CURL_{_name}", _value)  # read once, at the first request

_ABSENT = b"\x02"  # TensorStore's generation of a key without a value
_URL = re.compile(r"(gs|s3)://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(?:/(.*))?", re.DOTALL)
_CURES = {
  "PERMISSION_DENIED": "check the credentials (gcloud auth application-default login; AWS_ACCESS_KEY_ID or "
  "AWS_PROFILE) and that they may list, read and, for a run, write and delete there",
  "UNAUTHENTICATED": "check the credentials",
  "NOT_FOUND": "check the name of the bucket",
}


def is_url(path):
  """Whether `path` names a place in a bucket, or would like to."""
  return "://" in str(path)


def safe_name(name):
  """Whether an object's `name` is a path that stays inside a folder when it is written there."""
  return bool(name) and not name.startswith("/") and "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def explain(error):
  """What one of TensorStore's errors says, in a line, and what helps."""
  line = re.split(r" \[\w+='", (str(error).strip().splitlines() or [type(error).__name__])[0])[0]
  cure = next((cure for status, cure in _CURES.items() if status in line), "check the network and the endpoint")
  return f"{line:.400}; {cure}"


class Store:
  """The objects below `url`, by names relative to it. Every method raises StorageError where the bucket refuses."""

  def __init__(self, url):
    self.url = str(url).rstrip("/")
    self._context = ts.Context({"gcs_request_retries": RETRIES, "s3_request_retries": RETRIES})
    self._base = self._spec()
    self._objects = self._do("opened", lambda: ts.KvStore.open(self._base, context=self._context))

  def read(self, name):
    """The bytes of an object; None where there is none."""
    return self.read_newer(name, None)[0]

  def read_newer(self, name, generation):
    """(bytes, generation in hex) of an object. Bytes are None where there is none, or it still has `generation`."""
    known = bytes.fromhex(generation) if generation else None
    found = self._do("read", lambda: self._objects.read(name, if_not_equal=known), name)
    content = found.value if found.state == "value" else None
    return content, None if found.state == "missing" else found.stamp.generation.hex()

  def write(self, name, content):
    """Replaces an object by `content`, bytes."""
    self._do("written", lambda: self._objects.write(name, content), name)

  def write_new(self, name, content):
    """As `write`, but raises StorageError where there is an object with other content."""
    stamp = self._do("written", lambda: self._objects.write(name, content, if_equal=_ABSENT), name)
    # An attempt whose answer was lost has written, and makes the next one fail.
    if not stamp.generation and self.read(name) != content:
      raise StorageError(f"{self.url}/{name} was written by another process meanwhile: one run at a time has a workdir")

  def names(self, prefix=""):
    """Names of all objects that start with `prefix`, sorted.

    Lists that GCS refuses (401, 403, no such bucket) come back empty from TensorStore, or end early.
    """
    names = self._do("listed", lambda: self._objects.list(_range(prefix)), prefix)
    return sorted(name.decode() for name in names)

  def has(self, name):
    """Whether there is an object `name`, by a list: to read it would be to read all of it."""
    end = f"{name}!"  # before which hardly another name comes: those with a space or a control character
    return name.encode() in self._do("listed", lambda: self._objects.list(ts.KvStore.KeyRange(name, end)), name)

  def remove(self, name):
    """Removes one object, if it is there."""
    self._do("deleted", lambda: self._objects.write(name, None), name)

  def delete(self, prefix):
    """Removes all objects whose names start with `prefix`."""
    self._do("deleted", lambda: self._objects.delete_range(_range(prefix)), prefix)

  def arrays(self, name):
    """(spec of a kvstore for the folder `name`, context that bounds its retries), for arrays."""
    return self._base | {"path": f"{self._base['path']}{name}/"}, self._context

  def _do(self, what, start, name=""):
    """The result of the future that `start` gives."""
    try:
      return start().result()
    except (ValueError, RuntimeError) as error:  # what TensorStore raises for every status
      raise StorageError(f"{self.url}/{name} cannot be {what}: {explain(error)}") from None

  def _spec(self):
    matched = _URL.fullmatch(self.url)
    if not matched or (matched[3] and not safe_name(matched[3])):
      raise StorageError(f"{self.url} is not a place in a bucket: expected gs://BUCKET/PATH or s3://BUCKET/PATH")
    scheme, bucket, path = matched[1], matched[2], f"{matched[3]}/" if matched[3] else ""
    if scheme == "gs":
      return {"driver": "gcs", "bucket": bucket, "path": path}
    environment, spec = os.environ, {"driver": "s3", "bucket": bucket, "path": path}
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if endpoint := environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL"):
      spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
      spec |= {"aws_region": region}
    if environment.get("AWS_ACCESS_KEY_ID"):  # what looks further complains about files that need not be there
      spec |= {"aws_credentials": {"type": "environment"}}
    return spec


def _range(prefix):
  """The keys that start with `prefix`."""
  return ts.KvStore.KeyRange(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1)) if prefix else ts.KvStore.KeyRange()


class RunFolder:
  """Where a run writes its small files: `path` is `workdir` itself, or for a URL a folder that `publish` copies there.

  Objects cannot be appended to: files are copied whole, when they have changed.
  """

  def __init__(self, workdir):
    self.path, self._store, self._published = str(workdir), None, {}
    if is_url(workdir):
      self._store, self.path = Store(workdir), tempfile.mkdtemp(prefix="deepseek_jax-")
      weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

  def fetch(self, names):
    """Copies the files `names` here, where there are any, so that they can be appended to.

    Raises StorageError for a bucket that cannot be read, or not be written.
    """
    if not self._store:
      return
    probe = f".probe-{uuid.uuid4().hex[:8]}"
    self._store.write(probe, b"")
    self._store.remove(probe)
    for name in names:
      content = self._store.read(name)
      if content is not None:
        pathlib.Path(self.path, name).write_bytes(content)

  def publish(self):
    """Copies files that are new or have changed to the bucket; nothing to do for a local workdir."""
    if not self._store:
      return
    for path in sorted(pathlib.Path(self.path).rglob("*")):
      status = path.stat()
      if path.is_file() and self._published.get(path) != (status.st_size, status.st_mtime_ns):
        self._store.write(path.relative_to(self.path).as_posix(), path.read_bytes())
        self._published[path] = status.st_size, status.st_mtime_ns


def in_parallel(function, names):
  """{name: function(name)}, four at a time. After an error no more are begun, so that an outage is waited out once."""
  failed = threading.Event()

  def call(name):
    if not failed.is_set():
      try:
        return function(name)
      except Exception:
        failed.set()
        raise

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    return dict(zip(names, pool.map(call, names), strict=True))


def read_file(url):
  """The bytes of the object at `url`; None where there is none."""
  folder, _, name = url.rpartition("/")
  return Store(folder).read(name)
