"""Where training text is: the files of one entry of data.sources, and a fingerprint of their content."""

import concurrent.futures
import dataclasses
import glob
import hashlib
import json
import os
import pathlib
import sysconfig
import time
from collections.abc import Collection, Iterator

from deepseek_jax.data import cache, key_value_retrieval, readers, remote
from deepseek_jax.errors import DataError
from deepseek_jax.storage import is_url

# Tests are two thirds of the standard library and unlike the rest; site-packages is what happens to be installed.
STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}

# A file that was modified this recently could be written again without a change of its modification time: its hash is
# not cached.
MTIME_SETTLE_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class SourceFile:
  """A file of a source: `name` is its path within the source, with forward slashes."""

  name: str
  path: pathlib.Path
  size: int
  mtime_ns: int


@dataclasses.dataclass(frozen=True)
class Source:
  """The files of one entry of data.sources, sorted by name."""

  name: str
  files: tuple[SourceFile, ...]

  @property
  def size(self) -> int:
    """Bytes on disk."""
    return sum(file.size for file in self.files)

  def fingerprint(self, hash_cache: pathlib.Path) -> str:
    """Hex hash of the names and contents of the files.

    The JSON file `hash_cache` has hashes by (path, size, modification time), so that an unchanged corpus is not read at
    every start.
    """
    cached = cache.read_json_dict(hash_cache)
    keys = [f"{file.path.resolve()} {file.size} {file.mtime_ns}" for file in self.files]
    not_cached = {key: file.path for key, file in zip(keys, self.files, strict=True) if key not in cached}
    with concurrent.futures.ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
      computed = dict(zip(not_cached, pool.map(_sha256, not_cached.values()), strict=True))
    hashes = {key: computed.get(key) or cached[key] for key in keys}
    settled = time.time_ns() - MTIME_SETTLE_SECONDS * 1e9
    to_cache = {key: hashes[key] for key, file in zip(keys, self.files, strict=True) if file.mtime_ns < settled}
    if to_cache != cached:
      cache.write_atomically(hash_cache, json.dumps(to_cache))
    names_and_hashes = [[file.name, hashes[key]] for key, file in zip(keys, self.files, strict=True)]
    return hashlib.sha256(json.dumps(names_and_hashes).encode()).hexdigest()

  def check_unchanged(self) -> None:
    """Raises DataError if a file has changed since the source was made."""
    for file in self.files:
      if stat_file(file.name, file.path) != file:
        raise DataError(f"{file.path} changed while data was packed: run again when nothing writes to it")


def find_source(name: str, object_cache: pathlib.Path | None = None) -> Source:
  """The Source for `name`: python-stdlib, key-value-retrieval, a file, a folder (with its subfolders) or a glob.

  The last three may be in a bucket (gs://, s3://). Their objects are downloaded below the folder `object_cache`, where the
  documents of key-value-retrieval are written too.
  Raises DataError when there is no such path, or nothing under it has a known suffix.
  """
  root: pathlib.Path | str
  if name == "python-stdlib":
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    paths = [path for path in _list_files(root, STDLIB_EXCLUDED) if path.suffix == ".py"]
  elif name == key_value_retrieval.NAME:
    assert object_cache is not None, "a source that is made needs a folder for its documents"
    paths = key_value_retrieval.write_documents(read_stdlib(), object_cache)
    root = paths[0].parent
  elif is_url(name):
    assert object_cache is not None, "a source in a bucket needs a folder for its objects"
    root, paths = remote.download_source(name, object_cache)
  else:
    root = pathlib.Path(name).expanduser()
    if root.is_dir():
      paths = _list_files(root, {"__pycache__"})
    elif root.is_file():
      root, paths = root.parent, [root]
    else:
      paths = [pathlib.Path(path) for path in glob.glob(str(root), recursive=True) if os.path.isfile(path)]
      if not paths:
        problem = f"no file matches {name}" if glob.has_magic(str(root)) else f"there is no {name}"
        where = "" if root.is_absolute() else f" (in {os.getcwd()})"
        raise DataError(
          f"data.sources: expected python-stdlib, key-value-retrieval, a file, a folder or a glob; {problem}{where}"
        )
      root = os.path.commonpath([path.parent for path in paths]) if paths else root
  paths = [path for path in paths if readers.reader_suffix(path)]
  if not paths:
    raise DataError(f"data.sources: nothing at {name} ends in {' '.join(readers.READERS)}: name a file that does")
  files = (stat_file(path.relative_to(root).as_posix(), path) for path in paths)
  return Source(name, tuple(sorted(files, key=lambda file: file.name)))


def read_stdlib() -> Iterator[str]:
  """Yields the documents of python-stdlib."""
  for file in find_source("python-stdlib").files:
    for document in readers.read_documents(file.path, text_field=""):
      yield str(document.text)


def stat_file(name: str, path: pathlib.Path) -> SourceFile:
  """The SourceFile `name` at `path` as it is now. Raises DataError where it cannot be read."""
  try:
    status = path.stat()
  except OSError as error:
    raise DataError(f"cannot read {path}: {error.strerror}") from None
  return SourceFile(name, path, status.st_size, status.st_mtime_ns)


def _list_files(root: pathlib.Path, excluded: Collection[str]) -> list[pathlib.Path]:
  """Paths of the files under `root`, without hidden files and folders, folders in `excluded`, and links to folders."""
  paths = []
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if name not in excluded and not name.startswith(".")]
    paths += [pathlib.Path(folder, name) for name in names if not name.startswith(".")]
  return paths


def _sha256(path: pathlib.Path) -> str:
  try:
    with open(path, "rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise DataError(f"cannot read {path}: {error.strerror}; make it readable or take it out of data.sources") from None
