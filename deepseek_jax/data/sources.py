"""Where training text is: files found for one entry of data.sources, and a fingerprint of what they hold."""

import concurrent.futures
import dataclasses
import glob
import hashlib
import json
import os
import pathlib
import sysconfig
import time

from deepseek_jax.data import cache, readers, remote
from deepseek_jax.errors import DataError
from deepseek_jax.storage import is_url

# Tests are two thirds of the standard library and unlike the rest; site-packages is what happens to be installed.
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}

# A file whose modification time is this fresh could be written again within the clock's tick: not remembered.
SETTLED_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class File:
  """A file of a source: `name` is its path within the source, with forward slashes."""

  name: str
  path: pathlib.Path
  size: int
  mtime_ns: int


@dataclasses.dataclass(frozen=True)
class Source:
  """The files of one entry of data.sources, sorted by name."""

  name: str
  files: tuple[File, ...]

  @property
  def size(self):
    """Bytes on disk."""
    return sum(file.size for file in self.files)

  def fingerprint(self, memo):
    """Hex hash of the names and contents of the files.

    Hashes are remembered in the JSON file `memo` by (path, size, modification time), so that an unchanged corpus is
    not read at every start.
    """
    known = cache.read_memo(memo)
    keys = [f"{file.path.resolve()} {file.size} {file.mtime_ns}" for file in self.files]
    unknown = {key: file.path for key, file in zip(keys, self.files, strict=True) if key not in known}
    with concurrent.futures.ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
      fresh = dict(zip(unknown, pool.map(_sha256, unknown.values()), strict=True))
    hashes = {key: fresh.get(key) or known[key] for key in keys}
    settled = time.time_ns() - SETTLED_SECONDS * 1e9
    memory = {key: hashes[key] for key, file in zip(keys, self.files, strict=True) if file.mtime_ns < settled}
    if memory != known:
      cache.write_atomically(memo, json.dumps(memory))
    listing = [[file.name, hashes[key]] for key, file in zip(keys, self.files, strict=True)]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

  def check_unchanged(self):
    """Raises DataError if a file is not the one that was found."""
    for file in self.files:
      if stat(file.name, file.path) != file:
        raise DataError(f"{file.path} changed while data was packed: run again when nothing writes to it")


def find(name, copies=None):
  """The Source for `name`: python-stdlib, a file, a folder (searched with its subfolders) or a glob; the last three also
  in a bucket (gs://, s3://), whose objects are copied below the folder `copies`.

  Raises DataError when there is no such path, or nothing under it has a known suffix.
  """
  if name == "python-stdlib":
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    paths = [path for path in _walk(root, NOT_LIBRARY) if path.suffix == ".py"]
  elif is_url(name):
    root, paths = remote.fetch(name, copies)
  else:
    root = pathlib.Path(name).expanduser()
    if root.is_dir():
      paths = _walk(root, {"__pycache__"})
    elif root.is_file():
      root, paths = root.parent, [root]
    else:
      paths = [pathlib.Path(path) for path in glob.glob(str(root), recursive=True) if os.path.isfile(path)]
      if not paths and not glob.has_magic(str(root)):
        raise DataError(f"data.sources: expected python-stdlib, a file, a folder or a glob; there is no {name}")
      root = os.path.commonpath([path.parent for path in paths]) if paths else root
  paths = [path for path in paths if readers.suffix(path)]
  if not paths:
    raise DataError(f"data.sources: nothing at {name} ends in {' '.join(readers.READERS)}: name a file that does")
  files = (stat(path.relative_to(root).as_posix(), path) for path in paths)
  return Source(name, tuple(sorted(files, key=lambda file: file.name)))


def stat(name, path):
  """The File at `path` as it is now."""
  try:
    status = path.stat()
  except OSError as error:
    raise DataError(f"cannot read {path}: {error.strerror}") from None
  return File(name, path, status.st_size, status.st_mtime_ns)


def _walk(root, skipped):
  """Paths of the files under `root`, without hidden folders, those named in `skipped`, and links to folders."""
  paths = []
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
    paths += [pathlib.Path(folder, name) for name in names if not name.startswith(".")]
  return paths


def _sha256(path):
  try:
    with open(path, "rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise DataError(f"cannot read {path}: {error.strerror}; make it readable or take it out of data.sources") from None
