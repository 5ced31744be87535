"""One process at a time trains in a workdir: two would clean up each other's saves and mix their metrics."""

import fcntl
import os
import pathlib
import socket
from typing import TextIO

from deepseek_jax.errors import CheckpointError


def lock_workdir(directory: pathlib.Path) -> TextIO:
  """Locks `directory`/.lock.

  Returns the open file: the lock ends when it is closed, or when the process ends in any way.

  Raises CheckpointError where another process has the lock, OSError where the file cannot be written.
  """
  file = open(directory / ".lock", "a+", encoding="utf-8")
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    with file:
      file.seek(0)
      holder = file.read() or "unknown"
    raise CheckpointError(
      f"another process trains in {directory.parent} (pid {holder}): wait for it, or use another --workdir"
    ) from None
  except OSError:
    return file  # This file system has no locks, and a run there is worth more than the protection.
  file.truncate(0)
  file.write(f"{os.getpid()} on {socket.gethostname()}")
  file.flush()
  return file
