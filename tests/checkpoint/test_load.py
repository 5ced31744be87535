"""Saved models of both kinds, opened by what is in the folder, on one device and on several."""

import json

import jax
import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.checkpoint.convert import convert
from deepseek_jax.checkpoint.load import open_saved_model, open_workdir
from deepseek_jax.data.tokenizer import NO_TOKENIZER
from deepseek_jax.errors import CheckpointError, ConfigError, DataError
from tests.saved_models import SEQ, VOCAB, write_hugging_face, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_hugging_face(tmp_path_factory.mktemp("load") / "hf")


def as_numpy(tree):
  return jax.tree.map(np.asarray, tree)


def assert_equal(got, want):
  jax.tree.map(np.testing.assert_array_equal, as_numpy(got), as_numpy(want))


@pytest.mark.parametrize("devices", [1, 4])
def test_the_weights_of_a_hugging_face_folder(folder, devices):
  saved = open_saved_model(folder)
  assert (saved.step, saved.fingerprint, saved.config.data.seq) == (None, None, SEQ)
  assert saved.load_tokenizer().vocab == VOCAB
  loaded, expected = saved.load(devices), deepseek_jax.load_pretrained(folder)
  assert loaded.mesh.size == devices
  assert_equal((loaded.params, loaded.buffers), (expected.params, expected.buffers))


def test_the_weights_of_a_workdir(folder, tmp_path):
  convert(folder, tmp_path / "run")
  saved = open_saved_model(tmp_path / "run")
  assert saved.step == 0 and saved.source == str(tmp_path / "run")
  assert saved.config.data.tokenizer.endswith("tokenizer.json")
  assert_equal(saved.load(2).params, open_saved_model(folder).load().params)


@pytest.mark.parametrize("is_run", [False, True])
def test_parameters_in_a_dtype_that_no_run_has(folder, tmp_path, is_run):
  if is_run:
    convert(folder, tmp_path / "run")
  saved = open_saved_model(tmp_path / "run" if is_run else folder)
  loaded, full = saved.load(2, params_dtype="bfloat16"), saved.load()
  assert_equal(loaded.params, jax.tree.map(lambda array: array.astype("bfloat16"), full.params))
  assert_equal(loaded.buffers, full.buffers)
  assert all(array.dtype == "float32" for array in jax.tree.leaves(loaded.buffers))


@pytest.mark.parametrize("add_bos", [True, False])
def test_prompts_of_weights_trained_elsewhere_begin_as_the_tokenizer_says(tmp_path, add_bos):
  saved = open_saved_model(write_hugging_face(tmp_path / "hf", add_bos))
  assert saved.add_bos(saved.load_tokenizer()) is add_bos


def test_another_tokenizer_than_that_of_the_training_is_refused(folder, tmp_path):
  convert(folder, tmp_path / "run")
  path = tmp_path / "run" / "checkpoints" / "0" / "meta" / "metadata"
  meta = json.loads(path.read_text())
  saved = open_workdir(tmp_path / "run")
  path.write_text(json.dumps(meta | {"tokenizer_fingerprint": saved.load_tokenizer().fingerprint}))
  (tmp_path / "run" / "checkpoints" / "0" / "manifest.json").unlink()  # it has the checksum of the old file
  trained_here = open_workdir(tmp_path / "run", step=0)
  assert trained_here.add_bos(trained_here.load_tokenizer())
  with pytest.raises(DataError, match="data.tokenizer=byte is not the one of the checkpoint.*--tokenizer"):
    trained_here.load_tokenizer("byte")


def test_a_folder_without_a_tokenizer_needs_one(tmp_path):
  saved = open_saved_model(write_hugging_face(tmp_path / "hf", tokenizer=False))
  assert saved.config.data.tokenizer == NO_TOKENIZER
  with pytest.raises(DataError, match="came without a tokenizer.*--tokenizer="):
    saved.load_tokenizer()
  assert saved.load_tokenizer("byte").vocab == 257
  (tmp_path / "other").mkdir()
  write_tokenizer(tmp_path / "other", add_bos=True)
  assert saved.load_tokenizer(str(tmp_path / "other" / "tokenizer.json")).bos == 0


def test_what_is_not_there(folder, tmp_path):
  with pytest.raises(ConfigError, match="--devices=5, but 4 are here"):
    open_saved_model(folder).load(5)
  (tmp_path / "run" / "checkpoints").mkdir(parents=True)
  with pytest.raises(CheckpointError, match="no checkpoint in .*train one"):
    open_saved_model(tmp_path / "run")
  with pytest.raises(CheckpointError, match="is no checkpoint: expected a Hugging Face folder"):
    open_saved_model(tmp_path)
