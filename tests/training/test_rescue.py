"""Where the updates of a run go that cannot write its files; whole runs are in tests/end_to_end/test_run_faults.py."""

import shutil
import types

import jax.numpy as jnp
import pytest

from deepseek_jax.checkpoint.manager import Checkpointer
from deepseek_jax.config import Config
from deepseek_jax.errors import CheckpointError
from deepseek_jax.training.rescue import rescue

STATE = {"x": jnp.zeros(100)}


def fail(*arguments, **more):
  raise CheckpointError("no room; make some")


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The folder of temporary folders."""
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
  return tmp_path


def test_a_save_in_the_workdir_is_enough(folder):
  assert rescue(lambda: None, Config(), "", 7, STATE, {}).startswith("step 7 is saved: ")
  assert not list(folder.iterdir())


def test_a_temporary_folder_without_room_is_not_filled(folder, monkeypatch):
  monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=410))
  text = rescue(fail, Config(), "", 7, STATE, {})
  assert (
    f"step 7 can be saved neither there nor in {folder} (OSError: 410 bytes are free there, the checkpoint has 400)"
    in text
  )
  assert not list(folder.iterdir())


def test_of_a_temporary_folder_that_takes_no_checkpoint_nothing_stays(folder, monkeypatch):
  monkeypatch.setattr(Checkpointer, "save", fail)
  text = rescue(fail, Config(), "", 7, STATE, {})
  assert f"neither there nor in {folder} (no room): make room" in text
  assert not list(folder.iterdir())
