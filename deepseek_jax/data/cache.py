"""The cache folder, which processes share: one at a time fills a part of it, and nothing there looks whole before it is."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import sys
import uuid


def root(config):
  """Folder of all that is packed and copied: in data.cache, else in the user's cache folder."""
  parent = config.cache or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(parent).expanduser() / "deepseek_jax"


@contextlib.contextmanager
def turn(path, does):
  """Lets one process at a time into the block, by a lock on the file `path`; gives whether the file system knows locks.

  Those that wait say that another one `does`, as in "packs text".
  """
  with open(path, "ab") as file:  # to write, since NFS locks no other
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      locked = True
    except BlockingIOError:
      print(f"data: waiting for another process, which {does}", file=sys.stderr, flush=True)
      fcntl.flock(file, fcntl.LOCK_EX)
      locked = True
    except OSError:
      locked = False
    yield locked


@contextlib.contextmanager
def temporary(folder, alone):
  """Gives a new folder beside `folder` for what is not whole yet. Those that others left go, if this process is `alone`."""
  for left in folder.parent.glob(f"{folder.name}.tmp-*") if alone else ():
    shutil.rmtree(left, ignore_errors=True)  # what is another user's stays
  made = folder.parent / f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}"
  made.mkdir()
  try:
    yield made
  finally:
    shutil.rmtree(made, ignore_errors=True)  # gone already where it was whole and renamed


def write_atomically(path, text):
  """Replaces the file at `path` by one that holds `text`, in one step."""
  temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
  temporary.write_text(text)
  os.replace(temporary, path)


def read_memo(path):
  """What the JSON file `path` remembers by name: nothing where it is missing or damaged."""
  try:
    memory = json.loads(path.read_bytes())
  except (OSError, ValueError):
    return {}
  return memory if isinstance(memory, dict) else {}
