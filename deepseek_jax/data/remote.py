"""Sources in buckets: objects are downloaded into a local cache, and again when they have changed."""

import fnmatch
import glob
import hashlib
import json
import pathlib
import re
import uuid

from deepseek_jax.data import cache, readers
from deepseek_jax.errors import DataError
from deepseek_jax.storage import ObjectStore, is_safe_name, map_parallel


def download_source(url: str, object_cache: pathlib.Path) -> tuple[pathlib.Path, list[pathlib.Path]]:
  """(folder, paths) of local copies of the objects at `url`: an object, a folder (with its subfolders) or a glob.

  object_cache: the folder with the copies of all sources. The object's generation in the bucket says whether a copy is
  still current. Raises DataError where nothing with a known suffix is found, StorageError where the bucket refuses.
  """
  before_glob = url[: min((url.find(c) for c in "*?[" if c in url), default=len(url))]
  parent = before_glob.rpartition("/")[0] if before_glob.count("/") > 2 else before_glob
  store, pattern = ObjectStore(parent), url[len(parent) + 1 :].rstrip("/")
  listed = _list_objects(store, pattern)
  visible = [name for name in listed if not any(component.startswith(".") for component in name.split("/"))]
  folder = object_cache / hashlib.sha256(store.url.encode()).hexdigest()[:16]
  names = [name for name in visible if readers.reader_suffix(folder / name)]
  if not names:
    raise DataError(
      f"data.sources: nothing at {url} ends in {' '.join(readers.READERS)}; name a file that does, and see that the "
      "bucket exists and may be listed"
    )
  if unsafe := [name for name in names if not is_safe_name(name)]:
    raise DataError(
      f"data.sources: {store.url} has {unsafe[0]!r}, which is no path inside a folder: rename that object"
    )
  try:
    _download_changed(store, names, folder)
  except OSError as error:
    raise DataError(
      f"cannot copy {url} to {folder}: {error.strerror}; make room, or set data.cache to another folder"
    ) from None
  return folder, [folder / name for name in names]


def _list_objects(store: ObjectStore, pattern: str) -> list[str]:
  """Names of the objects that `pattern` matches. A glob lists only names that begin with its part before a wildcard.

  TensorStore lists all levels below a prefix: a glob of one level costs the list of those below it, too.
  """
  if glob.has_magic(pattern):
    prefix = re.split(r"[*?[]", pattern, maxsplit=1)[0]
    names = store.list_names(prefix)
    return [name for name in names if _matches_glob(name.split("/"), pattern.split("/"))]
  names = store.list_names(f"{pattern}/" if pattern else "")
  if readers.reader_suffix(pathlib.PurePosixPath(pattern)) and store.exists(pattern):
    names.append(pattern)
  return names


def _matches_glob(components: list[str], patterns: list[str]) -> bool:
  """Whether the `components` of a path match `patterns`, of which ** stands for any number of components."""
  if not patterns or not components:
    return not components and set(patterns) <= {"**"}
  if patterns[0] == "**":
    return _matches_glob(components, patterns[1:]) or _matches_glob(components[1:], patterns)
  return fnmatch.fnmatchcase(components[0], patterns[0]) and _matches_glob(components[1:], patterns[1:])


def _download_changed(store: ObjectStore, names: list[str], folder: pathlib.Path) -> None:
  """Downloads the objects of which `folder` has no copy, or one of another generation.

  The others cost one request each.

  One process at a time does, and the others find its copies. After an error the next call continues; after a kill it
  starts over.
  """
  folder.mkdir(parents=True, exist_ok=True)
  lock, record_file = folder.with_name(f"{folder.name}.lock"), folder / ".copies.json"
  with (
    cache.exclusive_lock(lock, f"copies {store.url}") as locked,
    cache.temporary_folder(folder, remove_stale=locked) as temporary,
  ):
    record = cache.read_json_dict(record_file)  # {name: [generation, size, mtime_ns]}

    def download(name: str) -> None:
      path = folder / name
      generation, *size_and_mtime = record.get(name, [None])
      unchanged = size_and_mtime == _size_and_mtime(path)
      content, generation = store.read_if_changed(name, generation if unchanged else None)
      if generation is None:
        raise DataError(f"{store.url}/{name} is gone since it was listed: run again when nothing writes to the bucket")
      if content is not None:
        partial = temporary / uuid.uuid4().hex
        partial.write_bytes(content)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(path)
        record[name] = [generation, *(_size_and_mtime(path) or ())]

    try:
      map_parallel(download, names)
    finally:
      cache.write_atomically(record_file, json.dumps(record))


def _size_and_mtime(path: pathlib.Path) -> list[int] | None:
  """[bytes, modification time in ns] of a file; None where there is none."""
  try:
    status = path.stat()
  except FileNotFoundError:
    return None
  return [status.st_size, status.st_mtime_ns]
