import os
import pathlib

import pytest

from deepseek_jax.data import sources
from deepseek_jax.errors import DataError


@pytest.fixture
def corpus(tmp_path):
  """A folder of text whose files were last written long ago."""
  root = tmp_path / "corpus"
  for name in ("b.txt", "a/z.md", "a/y.jsonl.gz", "c.PY", "notes.doc", ".hidden.txt", ".git/x.txt", "__pycache__/x.py"):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"the text of {name}")
    os.utime(path, (1e9, 1e9))
  return root


def names(source):
  return [file.name for file in source.files]


def test_a_folder_is_searched_and_sorted(corpus):
  assert names(sources.find_source(str(corpus))) == ["a/y.jsonl.gz", "a/z.md", "b.txt", "c.PY"]


def test_a_file_and_a_glob(corpus):
  assert names(sources.find_source(str(corpus / "b.txt"))) == ["b.txt"]
  assert names(sources.find_source(str(corpus / "**/*.*"))) == [
    "__pycache__/x.py",
    "a/y.jsonl.gz",
    "a/z.md",
    "b.txt",
    "c.PY",
  ]
  assert names(sources.find_source(str(corpus / "a" / "*.md"))) == ["z.md"]


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("nowhere", "there is no .*nowhere"),
    ("empty", r"nothing at .*empty ends in \.txt \.md"),
    ("corpus/notes.doc", r"nothing at .*notes\.doc ends in"),
    ("corpus/*.doc", r"nothing at .*\*\.doc ends in"),
  ],
)
def test_nothing_to_read(corpus, name, message):
  (corpus.parent / "empty").mkdir()
  with pytest.raises(DataError, match=message):
    sources.find_source(str(corpus.parent / name))


def test_where_a_glob_was_looked_for(corpus, monkeypatch):
  with pytest.raises(DataError, match=r"; no file matches .*/\*\.none$"):
    sources.find_source(str(corpus / "*.none"))
  monkeypatch.chdir(corpus / "a")
  with pytest.raises(DataError, match=r"; no file matches \*\.none \(in .*corpus/a\)$"):
    sources.find_source("*.none")


def test_the_standard_library_is_without_tests_and_packages():
  found = names(sources.find_source("python-stdlib"))
  assert {"json/decoder.py", "argparse.py"} <= set(found)
  assert found == sorted(found)
  folders = {part for name in found for part in pathlib.PurePosixPath(name).parts[:-1]}
  assert not folders & {"test", "tests", "idlelib", "site-packages", "__pycache__"}


def test_the_fingerprint_follows_names_and_contents_alone(corpus, tmp_path):
  hash_cache = tmp_path / "hash_cache.json"
  first = sources.find_source(str(corpus)).fingerprint(hash_cache)
  moved = corpus.rename(tmp_path / "moved")
  assert sources.find_source(str(moved)).fingerprint(hash_cache) == first
  (moved / "b.txt").rename(moved / "bb.txt")
  renamed = sources.find_source(str(moved)).fingerprint(hash_cache)
  (moved / "bb.txt").write_text("other text")
  assert len({first, renamed, sources.find_source(str(moved)).fingerprint(hash_cache)}) == 3


def rewrite(path, text):
  """Other content of the same length and modification time: only reading it can tell."""
  status = path.stat()
  assert len(text) == status.st_size
  path.write_text(text)
  os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_unchanged_files_are_not_read_again(corpus, tmp_path):
  first = sources.find_source(str(corpus)).fingerprint(tmp_path / "hash_cache.json")
  rewrite(corpus / "b.txt", "The text of b.txt")
  assert sources.find_source(str(corpus)).fingerprint(tmp_path / "hash_cache.json") == first
  assert sources.find_source(str(corpus)).fingerprint(tmp_path / "new hash_cache.json") != first


def test_a_file_just_written_is_read_again(corpus, tmp_path):
  os.utime(corpus / "b.txt")
  first = sources.find_source(str(corpus)).fingerprint(tmp_path / "hash_cache.json")
  rewrite(corpus / "b.txt", "The text of b.txt")
  assert sources.find_source(str(corpus)).fingerprint(tmp_path / "hash_cache.json") != first


@pytest.mark.parametrize("content", ["", "[]", '{"a": '])
def test_a_damaged_memo_is_made_again(corpus, tmp_path, content):
  hash_cache = tmp_path / "hash_cache.json"
  first = sources.find_source(str(corpus)).fingerprint(hash_cache)
  good = hash_cache.read_text()
  hash_cache.write_text(content)
  assert sources.find_source(str(corpus)).fingerprint(hash_cache) == first
  assert hash_cache.read_text() == good


def test_a_file_that_changes_meanwhile(corpus):
  source = sources.find_source(str(corpus))
  source.check_unchanged()
  (corpus / "b.txt").write_text("longer than it was before")
  with pytest.raises(DataError, match=r"b\.txt changed while"):
    source.check_unchanged()
