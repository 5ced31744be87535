"""Sources in buckets: objects copied whole into a local cache, and again when they have changed."""

import fnmatch
import glob
import hashlib
import json
import os

from deepseek_jax.data import readers
from deepseek_jax.errors import DataError
from deepseek_jax.storage import Store, in_parallel, safe_name


def fetch(url, cache):
  """(folder, paths) of local copies of the objects at `url`: an object, a folder (with its subfolders) or a glob.

  `cache`: the folder for copies of all sources. Whether a copy is still good, the bucket tells by the object's generation.
  Raises DataError where nothing with a known suffix is found, StorageError where the bucket refuses.
  """
  fixed = url[: min((url.find(c) for c in "*?[" if c in url), default=len(url))]
  above = fixed.rpartition("/")[0] if fixed.count("/") > 2 else fixed
  store, pattern = Store(above), url[len(above) + 1 :].rstrip("/")
  names = [name for name in store.names() if not any(part.startswith(".") for part in name.split("/"))]
  wanted = [pattern.split("/")] if glob.has_magic(pattern) else [[pattern], [pattern, "**"]] if pattern else [["**"]]
  names = [name for name in names if any(_matches(name.split("/"), parts) for parts in wanted)]
  folder = cache / hashlib.sha256(store.url.encode()).hexdigest()[:16]
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


def _matches(parts, patterns):
  """Whether the names `parts` of a path fit `patterns`, of which ** stands for any number of names."""
  if not patterns or not parts:
    return not parts and set(patterns) <= {"**"}
  if patterns[0] == "**":
    return _matches(parts, patterns[1:]) or _matches(parts[1:], patterns)
  return fnmatch.fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])


def _update(store, names, folder):
  """Fetches the objects of which `folder` has no copy, or one of another generation; for the rest a request will do."""
  folder.mkdir(parents=True, exist_ok=True)
  memo = folder / ".generations.json"
  try:
    known = json.loads(memo.read_bytes())
  except (OSError, ValueError):
    known = {}

  def update(name):
    path = folder / name
    content, generation = store.read_newer(name, known.get(name) if path.is_file() else None)
    if generation is None:
      raise DataError(f"{store.url}/{name} is gone since it was listed: run again when nothing writes to the bucket")
    if content is not None:
      path.parent.mkdir(parents=True, exist_ok=True)
      _replace(path, content)
    return generation

  fresh = in_parallel(update, names)
  if known | fresh != known:
    _replace(memo, json.dumps(known | fresh).encode())


def _replace(path, content):
  partial = path.with_name(f".{path.name}.{os.getpid()}")
  partial.write_bytes(content)
  partial.replace(path)
