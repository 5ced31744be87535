"""Keeps log lines of C++ libraries out of what people read.

TensorStore logs to file descriptor 2 how it looks for credentials, and has no setting for that.
"""

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from typing import BinaryIO

# absl's format: severity and date, time, thread, file and line. Fatal lines stay.
_LOG_LINE = re.compile(rb"[IWE]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ \S+\] ")
_lock = threading.Lock()


@contextlib.contextmanager
def stderr_to(file: BinaryIO) -> Iterator[None]:
  """Sends to `file` what is written to file descriptor 2 during the block, also by C++ libraries.

  Raises OSError where there is no stderr.
  """
  stderr = os.dup(2)
  os.dup2(file.fileno(), 2)
  try:
    yield
  finally:
    os.dup2(stderr, 2)
    os.close(stderr)


@contextlib.contextmanager
def hide_native_logs() -> Iterator[None]:
  """Drops the lines that C++ libraries log to stderr during the block. What else is written there comes at its end.

  One thread at a time hides lines; others that enter meanwhile run without an effect of their own.
  """
  if not _lock.acquire(blocking=False):
    yield
    return
  try:
    with contextlib.ExitStack() as stack:
      with contextlib.suppress(OSError):  # no temporary folder, or no stderr
        log = stack.enter_context(tempfile.TemporaryFile())
        stack.callback(_write_other_lines, log)
        stack.enter_context(stderr_to(log))  # which ends first
      yield
  finally:
    _lock.release()


def _write_other_lines(log: BinaryIO) -> None:
  """Writes the lines of `log` that no C++ library has logged to stderr."""
  log.seek(0)
  for line in log:
    if not _LOG_LINE.match(line):
      os.write(2, line)
