"""Text in buckets: what is found, what is copied, and when it is copied again."""

import concurrent.futures
import pathlib
import signal
import subprocess
import sys

import pytest

from deepseek_jax.data import sources
from deepseek_jax.errors import DataError, StorageError

BOTH = pytest.mark.parametrize("scheme", ["gs", "s3"])


@pytest.fixture
def text(buckets):
  """The bucket, with text in folders, and what is not text."""
  for name in ("a.txt", "b.txt", "b.bin", ".hidden.txt", "deep/c.jsonl", "deep/er/d.txt", "deep/.er/e.txt"):
    buckets.put("bucket-a", f"text/{name}", name.encode())
  buckets.put("bucket-a", "text2/x.txt", b"x")
  return buckets


def names(source):
  return [file.name for file in source.files]


@BOTH
@pytest.mark.parametrize(
  ("path", "expected"),
  [
    ("text", ["a.txt", "b.txt", "deep/c.jsonl", "deep/er/d.txt"]),
    ("text/", ["a.txt", "b.txt", "deep/c.jsonl", "deep/er/d.txt"]),
    ("text/a.txt", ["a.txt"]),
    ("text/*.txt", ["a.txt", "b.txt"]),
    ("text/[b-z].*", ["b.txt"]),
    ("text/*/*", ["deep/c.jsonl"]),
    ("text/**/*.txt", ["a.txt", "b.txt", "deep/er/d.txt"]),
    ("te?t*/x.txt", ["text2/x.txt"]),
    ("", ["text/a.txt", "text/b.txt", "text/deep/c.jsonl", "text/deep/er/d.txt", "text2/x.txt"]),
  ],
)
def test_objects_folders_and_globs(text, scheme, path, expected, tmp_path):
  source = sources.find_source(f"{scheme}://bucket-a/{path}", tmp_path)
  assert [name.rpartition("text/")[2] for name in names(source)] == [name.rpartition("text/")[2] for name in expected]
  for file in source.files:
    assert tmp_path in file.path.parents
    assert file.path.read_bytes().decode() in file.name


@BOTH
@pytest.mark.parametrize(
  ("path", "prefix"), [("text", "text/"), ("text/a.txt", "text/a.txt"), ("text/de*/*", "text/de"), ("text/", "text/")]
)
def test_nothing_else_of_the_bucket_is_listed(text, scheme, path, prefix, tmp_path):
  text.listed.clear()
  sources.find_source(f"{scheme}://bucket-a/{path}", tmp_path)
  assert text.listed and all(name.startswith(prefix) for name in text.listed)


@BOTH
def test_of_several_processes_one_copies_and_the_others_find_it(text, scheme, tmp_path, capfd):
  text.fail(503, "GET text/.", times=4)  # so that all are there before the first has a copy
  text.sent.clear()
  with concurrent.futures.ThreadPoolExecutor(4) as pool:  # a lock is the open file's, and so between threads as well
    found = list(pool.map(sources.find_source, [f"{scheme}://bucket-a/text"] * 4, [tmp_path] * 4))
  assert set(text.sent.values()) == {1} and len(text.sent) == 4
  assert all(source == found[0] for source in found)
  assert f"waiting for another process, which copies {scheme}://bucket-a" in capfd.readouterr().err


def test_what_was_cut_short_is_not_taken_for_a_copy_and_what_was_whole_is(text, tmp_path):
  program = """
import os, pathlib, signal, sys
from deepseek_jax.data import sources
write = pathlib.Path.write_bytes
def cut_short(path, content):
  if content == b"b.txt":
    write(path, content[:2])
    os.kill(os.getpid(), signal.SIGKILL)
  return write(path, content)
pathlib.Path.write_bytes = cut_short
sources.find_source("gs://bucket-a/text", pathlib.Path(sys.argv[1]))
"""
  killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=pathlib.Path(__file__).parents[2])
  assert killed.returncode == -signal.SIGKILL
  assert [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"b."]
  assert not list(tmp_path.rglob("b.txt"))
  for file in sources.find_source("gs://bucket-a/text", tmp_path).files:
    assert file.path.read_bytes().decode() in file.name
  assert not list(tmp_path.glob("*.tmp-*"))
  text.put("bucket-a", "text/b.txt", b"B.txt")
  text.fail("cut", "GET text/b.txt")
  with pytest.raises(StorageError):
    sources.find_source("gs://bucket-a/text", tmp_path / "other")
  text.heal()
  text.sent.clear()
  sources.find_source("gs://bucket-a/text", tmp_path / "other")
  assert text.sent["text/b.txt"] == 1 and text.sent["text/a.txt"] == 0


def test_a_copy_that_is_not_as_it_was_left_is_made_again(text, tmp_path):
  first = sources.find_source("gs://bucket-a/text/*.txt", tmp_path).files[0]
  first.path.write_bytes(b"")
  assert sources.find_source("gs://bucket-a/text/*.txt", tmp_path).files[0].path.read_bytes() == b"a.txt"


@BOTH
def test_a_changed_object_is_noticed_and_nothing_else_is_copied_again(text, scheme, tmp_path):
  url, hash_cache = f"{scheme}://bucket-a/text/*.txt", tmp_path / "hash_cache.json"
  before = sources.find_source(url, tmp_path).fingerprint(hash_cache)
  assert sources.find_source(url, tmp_path).fingerprint(hash_cache) == before
  text.put("bucket-a", "text/b.txt", b"B.txt")  # of the same size
  first, second = sources.find_source(url, tmp_path).files
  assert (first.path.read_bytes(), second.path.read_bytes()) == (b"a.txt", b"B.txt")
  assert sources.find_source(url, tmp_path).fingerprint(hash_cache) != before
  first.path.unlink()
  assert names(sources.find_source(url, tmp_path)) == ["a.txt", "b.txt"]


def test_the_fingerprint_is_that_of_the_same_files_on_disk(text, tmp_path):
  (tmp_path / "disk").mkdir()
  for name in ("a.txt", "b.txt"):
    (tmp_path / "disk" / name).write_bytes(name.encode())
  remote = sources.find_source("gs://bucket-a/text/*.txt", tmp_path / "cache")
  assert remote.fingerprint(tmp_path / "1") == sources.find_source(str(tmp_path / "disk")).fingerprint(tmp_path / "2")


@pytest.mark.parametrize("name", ["/x.txt", "deep//x.txt", "x\0.txt"])
def test_an_object_that_is_no_path_in_a_folder_is_refused(text, name, tmp_path):
  text.put("bucket-a", f"text/{name}", b"x")
  with pytest.raises(DataError, match="which is no path inside a folder: rename that object"):
    sources.find_source("gs://bucket-a/text", tmp_path)
  assert not list(tmp_path.iterdir())


def test_no_object_leads_out_of_the_cache(text, tmp_path):
  text.put("bucket-a", "text/../../x.txt", b"x")  # hidden, as all that starts with a dot
  assert len(names(sources.find_source("gs://bucket-a/text", tmp_path / "cache"))) == 4
  assert not list(tmp_path.glob("**/x.txt"))


@BOTH
def test_what_cannot_be_found_or_reached(text, scheme, tmp_path):
  with pytest.raises(DataError, match="nothing at .*none.txt ends in .txt"):
    sources.find_source(f"{scheme}://bucket-a/text/none.txt", tmp_path)
  with pytest.raises(DataError, match="cannot copy .*: make room|cannot copy .*; make room"):
    (tmp_path / "file").write_bytes(b"")
    sources.find_source(f"{scheme}://bucket-a/text", tmp_path / "file")
  text.fail("cut", "GET text/b.txt", times=2)
  assert names(sources.find_source(f"{scheme}://bucket-a/text/*.txt", tmp_path)) == ["a.txt", "b.txt"]
  text.put("bucket-a", "text/b.txt", b"new")
  text.fail("cut", "GET text/b.txt")
  with pytest.raises(StorageError, match="text/b.txt cannot be read: .*network"):
    sources.find_source(f"{scheme}://bucket-a/text/*.txt", tmp_path)
