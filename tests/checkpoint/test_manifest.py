"""Each way in which a checkpoint's files can differ from its manifest has its own reason."""

import json
import os

import pytest

from deepseek_jax.checkpoint import manifest


@pytest.fixture
def step(tmp_path):
  folder = tmp_path / "7"
  (folder / "state" / "d").mkdir(parents=True)
  (folder / "state" / "d" / "data").write_bytes(os.urandom(3 << 20))
  (folder / "meta").mkdir()
  (folder / "meta" / "metadata").write_text('{"samples": 3}')
  (folder / "empty").write_bytes(b"")
  manifest.write_manifest(folder)
  return folder


def edit(step, change):
  content = json.loads((step / "manifest.json").read_text())
  change(content)
  (step / "manifest.json").write_text(json.dumps(content))


def test_untouched_step_verifies(step):
  assert manifest.verify(step) is None
  assert set(json.loads((step / "manifest.json").read_text())["files"]) == {"state/d/data", "meta/metadata", "empty"}
  assert not list(step.glob("*.tmp"))


def test_what_orbax_writes_at_commit_is_left_out(step):
  (step / "_CHECKPOINT_METADATA").write_text("{}")
  (step / "commit_success.txt").write_text("done")
  assert manifest.verify(step) is None


@pytest.mark.parametrize("offset", [0, 1 << 20, (3 << 20) - 1])
def test_flipped_bit(step, offset):
  data = step / "state" / "d" / "data"
  content = bytearray(data.read_bytes())
  content[offset] ^= 1
  data.write_bytes(content)
  assert manifest.verify(step).startswith("state/d/data has checksum ")


def test_truncated_file(step):
  with open(step / "state" / "d" / "data", "r+b") as f:
    f.truncate(100)
  assert manifest.verify(step) == f"state/d/data has 100 bytes, manifest.json says {3 << 20}"


def test_missing_file(step):
  (step / "meta" / "metadata").unlink()
  assert manifest.verify(step) == "meta/metadata is missing"


def test_extra_file(step):
  (step / "meta" / "other").write_text("")
  assert manifest.verify(step) == "meta/other is not in manifest.json"


@pytest.mark.parametrize("name", ["empty", "state/d"])
def test_link_in_place_of_a_file_or_folder(step, name, tmp_path):
  (step / name).rename(tmp_path / "moved")
  (step / name).symlink_to(tmp_path / "moved")
  assert manifest.verify(step) == f"{name} is a link or a device, not a file"


def test_pipe_does_not_hang(step):
  (step / "empty").unlink()
  os.mkfifo(step / "empty")
  assert manifest.verify(step) == "empty is a link or a device, not a file"


def test_missing_manifest_empty_folder_and_file_in_place_of_a_step(step, tmp_path):
  (step / "manifest.json").unlink()
  assert manifest.verify(step) == "manifest.json is missing"
  (tmp_path / "8").mkdir()
  assert manifest.verify(tmp_path / "8") == "the directory is empty"
  (tmp_path / "9").write_text("")
  assert manifest.verify(tmp_path / "9") == "it is not a directory"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_manifest_that_is_not_json(step, content):
  (step / "manifest.json").write_bytes(content)
  assert manifest.verify(step) == "manifest.json is not JSON"


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"format": 1, "files": []}'])
def test_manifest_without_files(step, content):
  (step / "manifest.json").write_text(content)
  assert manifest.verify(step) == 'manifest.json is malformed: no "files"'


@pytest.mark.parametrize("entry", [None, [], {"size": 0}, {"size": "0", "crc32": ""}, {"size": True, "crc32": ""}])
def test_malformed_entry(step, entry):
  edit(step, lambda content: content["files"].update(empty=entry))
  assert manifest.verify(step) == "manifest.json is malformed at 'empty'"


@pytest.mark.parametrize("name", ["../secret", "meta/../../secret", "/etc/hostname", "", ".", "meta//metadata", "a\0b"])
def test_names_outside_of_the_step_are_never_opened(step, name, tmp_path):
  (tmp_path / "secret").write_text("")
  edit(step, lambda content: content["files"].update({name: {"size": 0, "crc32": "00000000"}}))
  assert manifest.verify(step) == f"manifest.json names {name!r}, which is not a path inside the step"


@pytest.mark.parametrize("size", [-1, 10**30])
def test_impossible_size(step, size):
  edit(step, lambda content: content["files"]["empty"].update(size=size))
  assert manifest.verify(step) == f"empty has 0 bytes, manifest.json says {size}"


def test_newer_format(step):
  edit(step, lambda content: content.update(format=2))
  assert manifest.verify(step) == "manifest.json has format 2, this code reads 1"
