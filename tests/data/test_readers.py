import gzip
import json
import sys

import pytest

from deepseek_jax.data import readers
from deepseek_jax.errors import DataError

TEXTS = ["first\nof two lines", "naïve 日本", "x" * 100_000]
LINES = "\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS)).encode()


def write(path, lines=LINES):
  """`lines` in the form that the suffix of `path` names."""
  if path.name.lower().endswith(".gz"):
    lines = gzip.compress(lines)
  elif path.name.endswith(".zst"):
    lines = pytest.importorskip("zstandard").ZstdCompressor().compress(lines)
  path.write_bytes(lines)
  return path


def read(path, text_field="text"):
  return [document.text for document in readers.read_documents(path, text_field)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "A.JSONL.GZ"])
def test_records_line_by_line(tmp_path, name):
  path = write(tmp_path / name, LINES + b"\n\n" + b'{"text": ""}\n')
  documents = list(readers.read_documents(path, "text"))
  assert [d.text for d in documents] == TEXTS
  assert [d.location for d in documents] == [f"{path}:{n}" for n in (1, 2, 3)]
  assert 0 < documents[0].bytes_read <= documents[-1].bytes_read <= path.stat().st_size


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_streams_one_after_another_are_one(tmp_path, name):
  path = write(tmp_path / name, LINES + b"\n")
  path.write_bytes(2 * path.read_bytes())
  assert read(path) == 2 * TEXTS


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_cut_or_damaged_stream(tmp_path, name):
  path = write(tmp_path / name)
  whole = path.read_bytes()
  path.write_bytes(whole[:-1])
  with pytest.raises(DataError, match=rf"{name} is truncated"):
    read(path)
  path.write_bytes(b"not" + whole)
  with pytest.raises(DataError, match=rf"{name} is .*damaged"):
    read(path)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (b'{"text": "a"', "a.jsonl:4 is not a JSON object"),
    (b'{"text": "\xff"}', "a.jsonl:4 is not a JSON object"),
    (b"[" * 100_000, "a.jsonl:4 is not a JSON object"),
    (b'{"body": "a", "id": 1}', r"a.jsonl:4 has no field 'text' \(its fields: body, id\): set data.text_field"),
    (b"{}", r"a.jsonl:4 has no field 'text' \(its fields: none\)"),
    (
      b'[{"text": "a"}]',
      r"a.jsonl:4 is a JSON array, not a JSON object: a .jsonl file has one object on each line, .*jq",
    ),
    (b'"text"', "a.jsonl:4 is a JSON string, not a JSON object: a .jsonl file has one object"),
    (b"null", "a.jsonl:4 is null, not a JSON object"),
    (b"[\n", r"a.jsonl:4 is not a JSON object: .*; a .jsonl file has one object on each line"),
    (b'{"text": 5}', "a.jsonl:4: the field 'text' is a number, not text: set data.text_field"),
    (b'{"text": ["a"]}', "a.jsonl:4: the field 'text' is a JSON array, not text"),
    (b'{"text": null}', "a.jsonl:4: the field 'text' is null, not text: set data.skip_null=true to skip"),
    (b'{"text": "ab\\ud800"}', "a.jsonl:4: the field 'text' is not valid Unicode at character 2"),
  ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
  with pytest.raises(DataError, match=message):
    read(write(tmp_path / "a.jsonl", LINES + b"\n" + line))


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_a_text_file_is_one_document_byte_for_byte(tmp_path, suffix):
  path = tmp_path / f"a{suffix}"
  path.write_bytes("a\r\nné\n".encode())
  assert read(path) == ["a\r\nné\n"]


def test_text_that_is_not_utf8_is_refused(tmp_path):
  (tmp_path / "a.txt").write_bytes("abcé".encode("latin-1"))
  with pytest.raises(DataError, match=r"a\.txt is not UTF-8 at byte 3 \(0xe9\)"):
    read(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_document_has_a_largest_size(tmp_path, monkeypatch, name):
  monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 50_000)
  with pytest.raises(DataError, match=rf"{name} .*50,000"):
    read(write(tmp_path / name, b"[" + b" " * 500_000))


def test_a_file_that_cannot_be_read(tmp_path):
  with pytest.raises(DataError, match=r"cannot read .*a\.txt: No such file"):
    read(tmp_path / "a.txt")


def write_parquet(path, values, column="text"):
  arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
  parquet.write_table(arrow.table({"id": range(len(values)), column: values}), path)
  return path


def test_parquet(tmp_path):
  assert read(write_parquet(tmp_path / "a.parquet", 100 * TEXTS[:2])) == 100 * TEXTS[:2]
  assert read(write_parquet(tmp_path / "b.parquet", TEXTS, "content"), "content") == TEXTS


def test_null_records_are_yielded_to_be_counted(tmp_path):
  write(tmp_path / "a.jsonl", b'{"text": null}\n{"text": "a"}\n{"text": ""}')
  write_parquet(tmp_path / "a.parquet", [None, "a", ""])
  for name in ("a.jsonl", "a.parquet"):
    assert [d.text for d in readers.read_documents(tmp_path / name, "text", skip_null=True)] == [None, "a"]


def test_bad_parquet(tmp_path):
  with pytest.raises(DataError, match=r"a\.parquet has no column 'text', only id, body: set data\.text_field"):
    read(write_parquet(tmp_path / "a.parquet", TEXTS, "body"))
  with pytest.raises(DataError, match=r"b\.parquet, row 1: the field 'text' is null.*data\.skip_null=true"):
    read(write_parquet(tmp_path / "b.parquet", ["a", None]))
  with pytest.raises(DataError, match=r"d\.parquet, row 0: the field 'text' is a number, not text"):
    read(write_parquet(tmp_path / "d.parquet", [1, 2]))
  (tmp_path / "c.parquet").write_bytes(b"PAR1")
  with pytest.raises(DataError, match=r"c\.parquet cannot be read as parquet"):
    read(tmp_path / "c.parquet")


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "large_binary"])
def test_parquet_strings_are_utf8_or_refused(tmp_path, kind):
  arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

  def read_column(values):
    column = arrow.array(values, "large_binary" if kind.startswith("large") else "binary")
    column = arrow.Array.from_buffers(getattr(arrow, kind)(), len(values), column.buffers())  # unchecked
    parquet.write_table(arrow.table({"text": column}), tmp_path / "a.parquet")
    return read(tmp_path / "a.parquet")

  assert read_column([text.encode() for text in TEXTS]) == TEXTS
  with pytest.raises(DataError, match=r"a\.parquet, row 1: the field 'text' is not UTF-8 at byte 3 \(0xe9\)"):
    read_column([b"good", "abcé".encode("latin-1")])


def test_zstd_frames_with_a_long_window(tmp_path):
  """--long=31, as corpora are compressed with: the library's own limit is 2^27."""
  zstandard = pytest.importorskip("zstandard")
  parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True, compression_level=1)
  compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # the size is not in the header
  (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(LINES) + compressor.flush())
  with pytest.raises(zstandard.ZstdError):
    zstandard.ZstdDecompressor().decompressobj().decompress((tmp_path / "a.jsonl.zst").read_bytes())
  assert read(tmp_path / "a.jsonl.zst") == TEXTS


@pytest.mark.parametrize(
  ("name", "module"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow"), ("a.parquet", "pyarrow.parquet")]
)
def test_a_missing_package_gives_its_install_line(tmp_path, monkeypatch, name, module):
  (tmp_path / name).write_bytes(b"anything")
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(DataError, match=rf"{name} needs the .* package: pip install '{module.split('.')[0]}'"):
    read(tmp_path / name)
