"""Sources in buckets: objects copied whole into a local cache, and again when they have changed."""

import fnmatch
import glob
import hashlib
import json
import pathlib
import re
import uuid

from deepseek_jax.data import cache, readers
from deepseek_jax.errors import DataError
from deepseek_jax.storage import Store, in_parallel, safe_name


def fetch(url, copies):
  """(folder, paths) of local copies of the objects at `url`: an object, a folder (with its subfolders) or a glob.

  `copies`: the folder for those of all sources. Whether one is still good, the bucket tells by the object's generation.
  Raises DataError where nothing with a known suffix is found, StorageError where the bucket refuses.
  """
  fixed = url[: min((url.find(c) for c in "*?[" if c in url), default=len(url))]
  above = fixed.rpartition("/")[0] if fixed.count("/") > 2 else fixed
  store, pattern = Store(above), url[len(above) + 1 :].rstrip("/")
  names = [name for name in _find(store, pattern) if not any(part.startswith(".") for part in name.split("/"))]
  folder = copies / hashlib.sha256(store.url.encode()).hexdigest()[:16]
  names = [name for name in names if readers.suffix(folder / name)]
  if not names:
    raise DataError(
      f"data.sources: nothing at {url} ends in {' '.join(readers.READERS)}; name a file that does, and see that the "
      "bucket exists and may be listed"
    )
  if wrong := [name for name in names if not safe_name(name)]:
    raise DataError(f"data.sources: {store.url} has {wrong[0]!r}, which is no path inside a folder: rename that object")
  try:
    _update(store, names, folder)
  except OSError as error:
    raise DataError(
      f"cannot copy {url} to {folder}: {error.strerror}; make room, or set data.cache to another folder"
    ) from None
  return folder, [folder / name for name in names]


def _find(store, pattern):
  """Names of the objects that `pattern` means; others are listed only where a glob begins as they do.

  TensorStore lists all levels below a prefix: a glob of one level costs the list of those below it, too.
  """
  if glob.has_magic(pattern):
    below = store.names(re.match(r"[^*?[]*", pattern)[0])
    return [name for name in below if _matches(name.split("/"), pattern.split("/"))]
  names = store.names(f"{pattern}/" if pattern else "")
  if readers.suffix(pathlib.PurePosixPath(pattern)) and store.has(pattern):
    names.append(pattern)
  return names


def _matches(parts, patterns):
  """Whether the names `parts` of a path fit `patterns`, of which ** stands for any number of names."""
  if not patterns or not parts:
    return not parts and set(patterns) <= {"**"}
  if patterns[0] == "**":
    return _matches(parts, patterns[1:]) or _matches(parts[1:], patterns)
  return fnmatch.fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])


def _update(store, names, folder):
  """Fetches the objects of which `folder` has no copy, or one of another generation; for the rest a request will do.

  One process at a time does, and the others find its copies. After an error the next call goes on from there, after a
  kill it begins anew.
  """
  folder.mkdir(parents=True, exist_ok=True)
  lock, memo = folder.with_name(f"{folder.name}.lock"), folder / ".copies.json"
  with cache.turn(lock, f"copies {store.url}") as alone, cache.temporary(folder, alone) as temporary:
    known = cache.read_memo(memo)  # {name: [generation, size, mtime_ns]}

    def update(name):
      path = folder / name
      generation, *copied = known.get(name, [None])
      content, generation = store.read_newer(name, generation if copied == _facts(path) else None)
      if generation is None:
        raise DataError(f"{store.url}/{name} is gone since it was listed: run again when nothing writes to the bucket")
      if content is not None:
        partial = temporary / uuid.uuid4().hex
        partial.write_bytes(content)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(path)
        known[name] = [generation, *_facts(path)]

    try:
      in_parallel(update, names)
    finally:
      cache.write_atomically(memo, json.dumps(known))


def _facts(path):
  """[size, modification time in ns] of a file; None where there is none."""
  try:
    status = path.stat()
  except FileNotFoundError:
    return None
  return [status.st_size, status.st_mtime_ns]
