"""The cache folder that processes share: one at a time writes an entry, which gets its name when it is complete."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

from deepseek_jax.config_sections import DataConfig
from deepseek_jax.console import current_console


def cache_root(config: DataConfig) -> pathlib.Path:
  """Folder of everything that is cached: below data.cache, or else below the user's cache folder."""
  parent = config.cache or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(parent).expanduser() / "deepseek_jax"


@contextlib.contextmanager
def exclusive_lock(path: str | os.PathLike, activity: str) -> Iterator[bool]:
  """Holds a lock on the file `path` during the block; yields whether the file system supports locks.

  A process that has to wait prints that another one `activity`, as in "packs text".
  """
  with open(path, "ab") as file:  # opened to write: NFS locks no other files
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      locked = True
    except BlockingIOError:
      current_console().print(f"data: waiting for another process, which {activity}", err=True)
      fcntl.flock(file, fcntl.LOCK_EX)
      locked = True
    except OSError:
      locked = False
    yield locked


@contextlib.contextmanager
def temporary_folder(target: pathlib.Path, remove_stale: bool) -> Iterator[pathlib.Path]:
  """Yields a new folder beside `target`, to be renamed to it when complete. Removes it afterwards if it still exists.

  remove_stale: first remove temporary folders that killed processes left. Only safe while the lock of `target` is held.
  """
  if remove_stale:
    for stale in target.parent.glob(f"{target.name}.tmp-*"):
      shutil.rmtree(stale, ignore_errors=True)  # another user's folder cannot be removed
  folder = target.parent / f"{target.name}.tmp-{uuid.uuid4().hex[:8]}"
  folder.mkdir()
  try:
    yield folder
  finally:
    shutil.rmtree(folder, ignore_errors=True)  # not there any more if it was renamed


def rename_unless_exists(temporary: pathlib.Path, folder: pathlib.Path) -> None:
  """Renames `temporary` to `folder`. Where another process was first, nothing happens: its folder has the same content."""
  try:
    temporary.rename(folder)
  except OSError:
    if not folder.is_dir():
      raise


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Replaces the file at `path` by one that holds `text`, in one step."""
  partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
  partial.write_text(text)
  os.replace(partial, path)


def read_json_dict(path: pathlib.Path) -> dict[str, Any]:
  """The JSON object in the file `path`; an empty dict where the file is missing or damaged."""
  try:
    content = json.loads(path.read_bytes())
  except (OSError, ValueError):
    return {}
  return content if isinstance(content, dict) else {}
