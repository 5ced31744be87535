"""One process at a time trains in a workdir: two would clean up each other's saves and mix their metrics."""

import fcntl
import os
import socket

from deepseek_jax.errors import CheckpointError


def hold(directory):
  """An open file: until it is closed, or its process ends in whatever way, `directory`/.lock is this process's.

  Raises CheckpointError where another process holds it, OSError where the file cannot be written.
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
    return file  # This file system knows no locks, and a run there is worth more than the protection.
  file.truncate(0)
  file.write(f"{os.getpid()} on {socket.gethostname()}")
  file.flush()
  return file
