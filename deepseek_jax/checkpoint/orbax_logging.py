"""Silences Orbax's log: it does not help users, and the checkpointer raises its errors as one.

Without this a full disk prints the same failure once per array, with a traceback each.
"""

import logging
import os
import sys
from typing import Any

_ORBAX = f"{os.sep}orbax{os.sep}"
_DATABASE = "OCDBT database"  # TensorStore's name of the format that Orbax writes


def silence_orbax() -> None:
  """Drops Orbax's log records, and what its background writes report after the first one has failed."""
  logging.getLogger("absl").addFilter(lambda record: _ORBAX not in record.pathname)
  # "exception was never retrieved": the writes after the first that failed. A task's record names Orbax's file, a
  # future's only the database.
  logging.getLogger("asyncio").addFilter(lambda record: not any(x in record.getMessage() for x in (_ORBAX, _DATABASE)))
  # Writes that end after Orbax has closed its event loop; TensorStore reports them to the hook without an object.
  default_hook = sys.unraisablehook

  def hook(unraisable: Any) -> None:
    if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
      default_hook(unraisable)

  sys.unraisablehook = hook
