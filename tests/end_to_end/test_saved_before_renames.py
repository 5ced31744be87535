"""A run that commit dab6e1f saved, whose config.json has the old names of config fields, resumes to the same values.

saved_before_renames.tar.xz was made on jax 0.10.2 with JAX_ENABLE_X64=1, four CPU devices and the XLA flags of
conftest.py:

    python -m deepseek_jax.train --config=config.py --workdir=run    # dab6e1f, 4 steps, checkpoints of 2 and 4

It holds config.py, text/, run/ without checkpoint 4 and what was logged after step 2, and expected.npz: every array of
checkpoint 4, rounded to float32.
"""

import json
import pathlib
import tarfile

import jax
import numpy as np
import pytest

from deepseek_jax import train
from deepseek_jax.checkpoint.arrays import open_arrays
from deepseek_jax.checkpoint.manager import CheckpointReader
from deepseek_jax.generate import decoding
from deepseek_jax.renamed_fields import RENAMED_FIELDS

pytestmark = pytest.mark.jax_version
ARCHIVE = pathlib.Path(__file__).with_name("saved_before_renames.tar.xz")


@pytest.fixture
def old_run(tmp_path, monkeypatch):
  """The unpacked archive as working directory, to which the paths in its config are relative, with float64 enabled."""
  with tarfile.open(ARCHIVE) as archive:
    archive.extractall(tmp_path, filter="data")
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(decoding, "continue_prompt", lambda *args: "")  # its compilation takes a fifth of the time
  jax.config.update("jax_enable_x64", True)
  yield tmp_path / "run"
  jax.config.update("jax_enable_x64", False)


def fields(config, prefix=""):
  """{dotted path: value} of nested dicts."""
  flat = {}
  for name, value in config.items():
    flat |= fields(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
  return flat


def test_resumes_by_workdir_alone_to_the_values_of_the_old_code(old_run, capsys):
  saved = fields(json.loads((old_run / "config.json").read_bytes()))
  renamed = {old: new for old, new in RENAMED_FIELDS.items() if old in saved}
  assert len(renamed) >= 7
  assert train.main(["train", "--workdir=run"]) == 0
  # It has no count of tokens: they are the samples at its own length.
  reader = CheckpointReader(old_run)
  assert "tokens" not in json.loads((old_run / "checkpoints/2/meta/metadata").read_bytes())
  assert (reader.meta(2)["samples"], reader.meta(2)["tokens"]) == (8, 8 * saved["data.seq"])
  assert "resume   from the checkpoint of step 2 (8 sequences, 128 tokens seen)" in capsys.readouterr().out
  logged = {line["step"]: line["tokens"] for line in map(json.loads, open(old_run / "metrics.jsonl"))}
  assert (logged[4], reader.meta(4)["tokens"]) == (16 * saved["data.seq"],) * 2
  current = fields(json.loads((old_run / "config.json").read_bytes()))
  assert {new: current[new] for new in renamed.values()} == {new: saved[old] for old, new in renamed.items()}

  expected = np.load("expected.npz")
  arrays = {
    "/".join(path): array.read().result() for path, array in open_arrays(old_run / "checkpoints/4/state").items()
  }
  assert arrays.keys() == set(expected.files)
  for name, array in arrays.items():
    # Sums that cancel leave rounding errors, which depend on the CPU.
    atol = 1e-9 * np.abs(expected[name]).max()
    np.testing.assert_allclose(array, expected[name], rtol=1e-6, atol=atol, err_msg=name)
