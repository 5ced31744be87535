"""A run whose files cannot be written any more: its unsaved updates go to the workdir, or else to a temporary folder."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from deepseek_jax.checkpoint.manager import Checkpointer
from deepseek_jax.config import Config
from deepseek_jax.errors import UserError, format_exception
from deepseek_jax.flags import write_config
from deepseek_jax.training.metrics import RESUME_FILES
from deepseek_jax.training.next_commands import continue_command
from deepseek_jax.typing import PyTree


def rescue(
  save: Callable[[], None], config: Config, run_folder: str, step: int, state: PyTree, meta: dict[str, Any]
) -> str:
  """Saves `state` by `save`, which raises where it cannot; then in a temporary folder. Returns what the user has to know.

  Args:
    run_folder: the local folder of the run's small files, which the temporary folder gets as well.
    step: of `state`, in completed updates.
    meta: of the checkpoint.
  """
  with contextlib.suppress(Exception):  # the error that the run ends with says more
    save()
    return f"step {step} is saved: mend that, then the same command continues from there"
  try:
    folder = _save_in_temporary_folder(config, run_folder, step, state, meta)
  except Exception as error:
    reason = str(error).partition(";")[0] if isinstance(error, UserError) else format_exception(error)
    return (
      f"step {step} can be saved neither there nor in {tempfile.gettempdir()} ({reason}): make room, then the same command "
      "continues from the newest checkpoint, if there is one"
    )
  return f"step {step} is saved in {folder}: {continue_command(folder)} continues from there"


def _save_in_temporary_folder(config: Config, run_folder: str, step: int, state: PyTree, meta: dict[str, Any]) -> str:
  """Saves a workdir with one checkpoint and returns its path. Raises OSError or CheckpointError."""
  size = sum(array.nbytes for array in jax.tree.leaves(state))
  free = shutil.disk_usage(tempfile.gettempdir()).free
  if free < 1.1 * size:
    raise OSError(f"{free:,} bytes are free there, the checkpoint has {size:,}")
  folder = tempfile.mkdtemp(prefix="deepseek_jax-")
  try:
    with Checkpointer(folder, config.checkpoint) as checkpointer:
      checkpointer.save(step, state, meta)
    write_config(config, folder)
  except BaseException:
    shutil.rmtree(folder, ignore_errors=True)
    raise
  with contextlib.suppress(OSError):  # curves, which the run can do without
    for name in RESUME_FILES:
      if os.path.exists(path := os.path.join(run_folder, name)):
        shutil.copy(path, folder)
  return folder
