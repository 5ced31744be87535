"""Keeps what Orbax prints off the terminal: it is of no use to a user, or is raised by the checkpointer as one error.

Without this a full disk shows the same failure once per array, as pages of tracebacks around the line that says it.
"""

import logging
import os
import sys

_ORBAX = f"{os.sep}orbax{os.sep}"


def silence_orbax():
  """Drops Orbax's log records, and what its background writes report after the first one has failed."""
  logging.getLogger("absl").addFilter(lambda record: _ORBAX not in record.pathname)
  # "Task exception was never retrieved": the writes after the first that failed.
  logging.getLogger("asyncio").addFilter(lambda record: _ORBAX not in record.getMessage())
  # Writes that end after Orbax has closed its event loop; TensorStore reports them to the hook without an object.
  show = sys.unraisablehook

  def hook(unraisable):
    if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
      show(unraisable)

  sys.unraisablehook = hook
