"""Keeps log lines of C++ libraries out of what people read.

TensorStore logs to file descriptor 2 how it looks for credentials, and has no setting for that.
"""

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator

# absl's format: severity and date, time, thread, file and line. Fatal lines stay.
_LOG_LINE = re.compile(rb"[IWE]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ \S+\] ")
_lock = threading.Lock()


@contextlib.contextmanager
def hide_native_logs() -> Iterator[None]:
  """Drops the lines that C++ libraries log to stderr during the block. What else is written there comes at its end.

  One thread at a time hides lines; others that enter meanwhile run without an effect of their own.
  """
  if not _lock.acquire(blocking=False):
    yield
    return
  try:
    try:
      stderr, log = os.dup(2), tempfile.TemporaryFile()
    except OSError:  # no stderr, or no temporary folder
      yield
      return
    with log:
      os.dup2(log.fileno(), 2)
      try:
        yield
      finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        log.seek(0)
        for line in log:
          if not _LOG_LINE.match(line):
            os.write(2, line)
  finally:
    _lock.release()
