import concurrent.futures
import errno
import fcntl
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.config_sections import DataConfig
from deepseek_jax.data import cache, packed_dataset, packing, pipeline, sources, tokenizer
from deepseek_jax.errors import ConfigError, DataError

ROOT = pathlib.Path(deepseek_jax.__file__).parents[1]
TEXTS = [f"document {i}: " + "naïve 日本 " * (i % 7) for i in range(200)] + [""]


@pytest.fixture
def corpus(tmp_path):
  path = tmp_path / "corpus.jsonl"
  path.write_text("\n".join(json.dumps({"text": text, "body": text.upper()}) for text in TEXTS))
  return path


@pytest.fixture
def config(tmp_path, corpus):
  return lambda **changes: DataConfig(
    **{"sources": (str(corpus),), "cache": str(tmp_path / "cache"), "seq": 32, "heldout_fraction": 0.2, **changes}
  )


def open_data(config, vocab=257, seed=0):
  return pipeline.open_data(config, vocab, seed)


def folder(config):
  [path] = [p for p in pathlib.Path(config.cache, "deepseek_jax").iterdir() if p.is_dir()]
  return path


def stream(split):
  windows = split.tokens(np.arange(len(split)))
  assert (windows[1:, 0] == windows[:-1, -1]).all()
  return np.concatenate([windows[0, :1], windows[:, 1:].ravel()])


def test_every_document_is_in_one_split_whole_and_in_order(config):
  data = open_data(config())
  found = []
  for split in (data.train, data.heldout):
    documents = bytes(np.where(stream(split) == 256, 0xFF, stream(split)).astype(np.uint8)).split(b"\xff")
    assert documents[0] == b""
    found.append([d.decode() for d in documents[1:-1]])  # the last is cut where the last window ends
  assert not set(found[0]) & set(found[1])
  for texts in found:
    assert texts == [text for text in TEXTS if text in texts]
  assert len(TEXTS) - 4 <= len(found[0]) + len(found[1])
  assert 20 < len(found[1]) < 60


def test_bytes_count_the_targets(config):
  data = open_data(config())
  for split in (data.train, data.heldout):
    ids = np.arange(len(split))
    np.testing.assert_array_equal(split.target_bytes(ids), (split.tokens(ids)[:, 1:] < 256).sum(1))
    assert split.target_bytes(ids).dtype == np.int64


def test_a_tokenizer_with_two_ends(config, monkeypatch):
  class Ended(tokenizer.ByteTokenizer):
    vocab, eos, fingerprint = 258, 257, "ended"

  monkeypatch.setattr(pipeline, "load_model_tokenizer", lambda name, vocab: Ended())
  data = open_data(config(), vocab=258)
  train = stream(data.train)
  ends, starts = np.flatnonzero(train == 257), np.flatnonzero(train == 256)
  assert train[0] == 256
  np.testing.assert_array_equal(ends[: len(starts) - 1] + 1, starts[1:])
  ids = np.arange(len(data.train))
  np.testing.assert_array_equal(data.train.target_bytes(ids), (data.train.tokens(ids)[:, 1:] < 256).sum(1))


def test_ids_beyond_the_tokenizer_are_refused_when_packing(config, monkeypatch):
  monkeypatch.setattr(tokenizer.ByteTokenizer, "vocab", 100)
  with pytest.raises(DataError, match="gave the id 1.., beyond its vocabulary of 100"):
    open_data(config())
  assert not [p for p in pathlib.Path(config().cache, "deepseek_jax").iterdir() if p.is_dir()]


def test_ids_beyond_the_model_are_refused(config):
  with pytest.raises(ConfigError, match="ids up to 256 but model.vocab=256: raise model.vocab to at least 257"):
    open_data(config(), vocab=256)


def test_unchanged_data_is_reused(config, capsys):
  first = open_data(config())
  built = folder(config()).stat().st_mtime_ns
  assert "packed into" in capsys.readouterr().err
  assert open_data(config()).fingerprint == first.fingerprint
  assert "reused from" in capsys.readouterr().err
  assert folder(config()).stat().st_mtime_ns == built


@pytest.mark.parametrize("change", [{"seq": 31}, {"heldout_fraction": 0.3}, {"text_field": "body"}])
def test_changed_settings_pack_anew(config, change):
  first, second = open_data(config()), open_data(config(**change))
  assert first.fingerprint != second.fingerprint
  assert len([p for p in pathlib.Path(config().cache, "deepseek_jax").iterdir() if p.is_dir()]) == 2


def test_changed_text_packs_anew(config, corpus):
  first = open_data(config())
  corpus.write_text(corpus.read_text().replace("document", "Document"))
  second = open_data(config())
  assert first.fingerprint != second.fingerprint
  assert (stream(second.train) == ord("D")).any()


def test_the_fingerprint_covers_the_order(config, corpus, tmp_path):
  shutil.copy(corpus, tmp_path / "other.jsonl")
  both = (str(corpus), str(tmp_path / "other.jsonl"))
  opened = [open_data(config()), open_data(config(), seed=1), open_data(config(sources=both)),
            open_data(config(sources=both, weights=(0.9, 0.1)))]  # fmt: skip
  assert len({data.fingerprint for data in opened}) == len(opened)


def damage(path, how):
  if how == "flip":
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
  elif how == "cut":
    path.write_bytes(path.read_bytes()[:-4])
  elif how == "grow":
    path.write_bytes(path.read_bytes() + bytes(4))
  else:
    path.unlink()


@pytest.mark.parametrize("how", ["flip", "cut", "grow", "delete"])
@pytest.mark.parametrize("name", ["train.tokens", "train.bytes", "heldout.tokens", "heldout.bytes", "index.json"])
def test_damage_names_the_file_and_the_way_out(config, name, how):
  first = open_data(config())
  damage(folder(config()) / name, how)
  with pytest.raises(DataError, match=rf"{name}: .*Delete the folder .*deepseek_jax") as caught:
    open_data(config())
  assert "\n" not in str(caught.value)
  shutil.rmtree(folder(config()))
  assert open_data(config()).fingerprint == first.fingerprint


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"crc32": 0}', "[" * 100_000, '"', "\udcff"])
def test_what_is_no_index_is_refused(config, text):
  open_data(config())
  (folder(config()) / "index.json").write_text(text, errors="surrogateescape")
  with pytest.raises(DataError, match=r"index\.json: not a complete index"):
    open_data(config())


def test_an_index_that_is_a_folder_is_refused(config):
  open_data(config())
  (folder(config()) / "index.json").unlink()
  (folder(config()) / "index.json").mkdir()
  with pytest.raises(DataError, match=r"index\.json: Is a directory\. Delete the folder"):
    open_data(config())


def test_the_index_of_other_data_is_refused(config, tmp_path):
  open_data(config())
  open_data(config(seq=31, cache=str(tmp_path / "other")))
  shutil.copy(folder(config(cache=str(tmp_path / "other"))) / "index.json", folder(config()))
  with pytest.raises(DataError, match=r"index\.json: format 1 and fingerprint .* expected"):
    open_data(config())


def test_checksums_can_be_left_out_but_sizes_not(config):
  open_data(config())
  damage(folder(config()) / "train.tokens", "flip")
  open_data(config(verify=False))
  damage(folder(config()) / "train.tokens", "cut")
  with pytest.raises(DataError, match=r"train\.tokens"):
    open_data(config(verify=False))


def test_of_two_builders_at_once_one_waits_for_the_other(config, monkeypatch, capfd):
  build, built = packing._write_packed, []

  def slow_build(*arguments):
    built.append(arguments)
    time.sleep(0.5)
    build(*arguments)

  monkeypatch.setattr(packing, "_write_packed", slow_build)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    first, second = pool.map(open_data, [config(), config()])
  np.testing.assert_array_equal(stream(first.train), stream(second.train))
  folder(config())  # is one
  assert len(built) == 1 and "waiting for another process, which packs" in capfd.readouterr().err


def test_what_a_killed_build_left_goes_with_the_next_one(config, corpus):
  program = f"""
import os, signal
from deepseek_jax.data import packed_dataset, pipeline
from deepseek_jax.config_sections import DataConfig
packed_dataset.write_index = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
pipeline.open_data({config()!r}, 257, 0)
"""
  killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert ".tmp-" in folder(config()).name and list(folder(config()).glob("train.tokens"))
  open_data(config())
  assert ".tmp-" not in folder(config()).name


def test_without_locks_two_builders_do_no_harm(config, monkeypatch):
  def flock(descriptor, operation):
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")

  write_index, building = packing.packed_dataset.write_index, []

  def second_build_meanwhile(path, *arguments):
    if not building:
      building.append(path)
      open_data(config())
      assert path.is_dir()  # its builder may live
    write_index(path, *arguments)

  monkeypatch.setattr(fcntl, "flock", flock)
  monkeypatch.setattr(packing.packed_dataset, "write_index", second_build_meanwhile)
  open_data(config())
  assert not building[0].exists()
  assert ".tmp-" not in folder(config()).name


def test_a_failed_build_leaves_nothing(config, corpus):
  corpus.write_text(corpus.read_text() + "\n{")
  with pytest.raises(DataError, match="corpus.jsonl:202"):
    open_data(config())
  assert not [p for p in pathlib.Path(config().cache, "deepseek_jax").iterdir() if p.is_dir()]


def test_a_source_that_changes_while_it_is_packed(config, corpus):
  source = sources.find_source(str(corpus))
  corpus.write_text(corpus.read_text() + '\n{"text": "more"}')
  with pytest.raises(DataError, match=r"corpus\.jsonl changed while data was packed"):
    packing.pack_source(source, tokenizer.load_tokenizer("byte"), config())


def test_a_cache_that_cannot_be_written(config, tmp_path):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(DataError, match=r"cannot write packed data under .*file.*set data\.cache"):
    open_data(config(cache=str(tmp_path / "file")))


def test_the_cache_follows_the_user(config, monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  open_data(config(cache=""))
  assert (tmp_path / "xdg" / "deepseek_jax").is_dir()
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  assert cache.cache_root(config(cache="")) == tmp_path / "home" / ".cache" / "deepseek_jax"


def test_too_little_text(config, tmp_path):
  (tmp_path / "one.txt").write_text("one document of some length, but only one")
  with pytest.raises(DataError, match=r"one\.txt: too little text, 41 B: its train split has .* window takes 33:"):
    open_data(config(sources=(str(tmp_path / "one.txt"),)))
  with pytest.raises(
    DataError, match=r"its train split has .* tokens, and one window takes 100,001: add text or lower data.seq$"
  ):
    open_data(config(seq=100_000))
  (tmp_path / "empty.txt").write_text("")
  with pytest.raises(DataError, match="too little text, 0 B: its train split has 0 tokens"):
    open_data(config(sources=(str(tmp_path / "empty.txt"),)))


LINES = [f"line {i}: naïve 日本 {i * i}" for i in range(400)]


def pieces_of(split):
  """The documents of a split; the last is cut where the last window ends."""
  documents = bytes(np.where(stream(split) == 256, 0xFF, stream(split)).astype(np.uint8)).split(b"\xff")
  return documents[1:]


def write_few(tmp_path, name):
  """A file of one text, or of two documents that are together that text."""
  text = "\n".join(LINES) + "\n"
  half = text.index("line 200")
  records = [{"text": text[:half]}, {"text": text[half:]}]
  (tmp_path / name).write_text("\n".join(map(json.dumps, records)) if name.endswith("l") else text)
  return str(tmp_path / name), text


@pytest.mark.parametrize(("name", "documents"), [("input.txt", "1 document"), ("two.jsonl", "2 documents")])
@pytest.mark.parametrize("fraction", [0.02, 0.05])
def test_too_few_documents_are_cut_into_pieces(config, tmp_path, capsys, name, documents, fraction):
  path, text = write_few(tmp_path, name)
  few = config(sources=(path,), heldout_fraction=fraction)
  data = open_data(few)
  [line] = [line for line in capsys.readouterr().err.splitlines() if f"{name}: " in line]
  assert f"{documents}, too few to hold some out, cut at line or sentence ends into " in line
  pieces = [pieces_of(split) for split in (data.train, data.heldout)]
  for *complete, last in pieces:
    assert all(piece.endswith(b"\n") and piece in text.encode() for piece in complete)
    assert last in text.encode()
  kept = sum(len(piece) for split in pieces for piece in split)
  assert len(text.encode()) - 2 * few.seq < kept <= len(text.encode())
  heldout = sum(map(len, pieces[1])) / len(text.encode())
  assert fraction / 2 < heldout < fraction + 0.06
  again = open_data(few)
  assert "reused from" in capsys.readouterr().err and again.fingerprint == data.fingerprint
  np.testing.assert_array_equal(stream(again.train), stream(data.train))


def test_several_sources_of_one_text_are_all_cut(config, tmp_path, capsys):
  names = [write_few(tmp_path, name)[0] for name in ("a.txt", "b.md")]
  data = open_data(config(sources=tuple(names), heldout_fraction=0.05))
  assert capsys.readouterr().err.count("cut at line or sentence ends") == 2
  assert len(data.train) > 5 * len(data.heldout) > 0


def test_documents_stay_whole_where_they_are_enough(config, corpus, tmp_path, capsys):
  """A source of one file beside one with held-out documents; and fingerprints that checkpoints were made with."""
  path, _ = write_few(tmp_path, "input.txt")
  for sources_of_run in ((str(corpus), path), (str(corpus),)):
    open_data(config(sources=sources_of_run))
    assert "cut at" not in capsys.readouterr().err
  fingerprint = packing.source_fingerprint("0" * 64, tokenizer.load_tokenizer("byte"), config())
  assert fingerprint == "56a246188c9b7569d45b2098e07799c0e5f6e423f5c0a1daaf9ed778eb63da64"


def test_null_records_are_an_error_or_skipped_and_counted(config, corpus, capsys):
  corpus.write_text(corpus.read_text() + 3 * '\n{"text": null}')
  with pytest.raises(DataError, match=r"corpus\.jsonl:202: the field 'text' is null.*data\.skip_null=true"):
    open_data(config())
  skipping = config(skip_null=True)
  first = open_data(skipping)
  assert "200 documents, 3 records skipped as null" in capsys.readouterr().err
  assert open_data(skipping).fingerprint == first.fingerprint
  assert "3 records skipped as null" in capsys.readouterr().err
  with pytest.raises(DataError, match="is null"):  # not the packed data of the other setting
    open_data(config())


def test_windows_by_length_go_from_those_of_short_documents_to_those_of_long_ones(config):
  shuffled, by_length = open_data(config()), open_data(config(order="by_length"))
  assert shuffled.fingerprint != by_length.fingerprint
  split, windows = by_length.train._splits[0], len(by_length.train)
  ids = by_length.window_ids(0, 2 * windows)
  assert sorted(ids[:windows]) == list(range(windows)) and (ids[:windows] == ids[windows:]).all()  # epochs are alike
  bos = by_length.tokenizer.bos
  starts = [*np.flatnonzero(split._stream == bos), len(split._stream)]
  lengths = np.repeat(np.diff(starts), np.diff(starts))  # of the document of each token
  longest = [lengths[i * 32 : i * 32 + 32].max() for i in range(windows)]
  assert split.longest_documents(bos).tolist() == longest
  assert (np.diff(np.array(longest)[ids[:windows]]) >= 0).all() and len(set(longest)) > 3


def test_the_longest_documents_are_the_same_in_chunks(config, monkeypatch):
  data = open_data(config())
  whole = data.train._splits[0].longest_documents(data.tokenizer.bos)
  monkeypatch.setattr(packed_dataset, "CHUNK_TOKENS", 7)
  assert (data.train._splits[0].longest_documents(data.tokenizer.bos) == whole).all()
