"""Documents in a file: one reader per suffix. Whatever cannot be read is an error that names file and place.

Text that is not UTF-8 is refused, not repaired: replacing what does not decode would teach the replacement character,
and hide that a whole corpus was saved in another encoding.
"""

import gzip
import itertools
import json
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from deepseek_jax.errors import DataError

MAX_DOCUMENT_BYTES = 1 << 28  # a document is in memory at once, and a compressed file can expand to any size
CHUNK_BYTES = 1 << 16  # read at once
ZSTD_MAX_WINDOW = 1 << 31  # bytes; the largest that zstd writes (--ultra --long=31)
ONE_OBJECT_A_LINE = (
  "a .jsonl file has one object on each line, as jq -c . FILE writes them (of an array: jq -c '.[]' FILE)"
)
_JSON_NAMES = {
  list: "a JSON array", dict: "a JSON object", str: "a JSON string", int: "a number", float: "a number", bool: "true or false",
  type(None): "null",
}  # fmt: skip


class Document(NamedTuple):
  """A text (None: its record has null), its file (and line), and how many bytes of that file were read then."""

  location: str
  text: str | None
  bytes_read: int


Reader = Callable[[pathlib.Path, str], Iterator[Document]]  # (path, text_field) -> documents


def reader_suffix(path: pathlib.PurePath) -> str | None:
  """The suffix of `path` that names its reader; None where there is no reader."""
  return next((s for s in READERS if path.name.lower().endswith(s)), None)


def is_one_document(path: pathlib.PurePath) -> bool:
  """Whether a file of this name is one document."""
  return READERS.get(str(reader_suffix(path))) is _read_text


def read_documents(path: pathlib.Path, text_field: str, skip_null: bool = False) -> Iterator[Document]:
  """Yields the documents of the file at `path` that are not empty.

  skip_null: also yields records without text, for the caller to count. Raises DataError for what cannot be read.
  """
  try:
    for document in READERS[str(reader_suffix(path))](path, text_field):
      if document.text is None and not skip_null:
        raise DataError(
          f"{document.location}: the field {text_field!r} is null, not text: set data.skip_null=true to skip such "
          "records, or data.text_field to the one that holds text"
        )
      if document.text != "":
        yield document
  except OSError as error:
    raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def _read_text(path: pathlib.Path, text_field: str) -> Iterator[Document]:
  size = path.stat().st_size
  if size > MAX_DOCUMENT_BYTES:
    raise DataError(
      f"{path} is one document of {size:,} bytes, above the limit of {MAX_DOCUMENT_BYTES:,}: "
      "split it, or put its documents into a .jsonl file"
    )
  content = path.read_bytes()
  try:
    text = content.decode()
  except UnicodeDecodeError as error:
    raise DataError(
      f"{path} is not UTF-8 at byte {error.start} ({content[error.start]:#04x}): "
      f"convert it (iconv -f ENCODING -t UTF-8) or take it out of data.sources"
    ) from None
  yield Document(str(path), text, len(content))


def _jsonl_reader(decompress: Callable[[BinaryIO], Iterator[bytes]]) -> Reader:
  """A reader of one JSON object per line, from the chunks of bytes that `decompress(file)` yields."""

  def read(path: pathlib.Path, text_field: str) -> Iterator[Document]:
    with open(path, "rb") as file:
      try:
        for number, line in enumerate(_split_lines(decompress(file), path), 1):
          if line.strip():
            location = f"{path}:{number}"
            yield Document(location, _text_of_record(line, text_field, location), file.tell())
      except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is truncated or damaged ({error}): fetch or compress it again") from None

  return read


def _split_lines(chunks: Iterable[bytes], path: pathlib.Path) -> Iterator[bytes]:
  """Yields the lines in `chunks` of bytes, without their line breaks."""
  fragments, size = [], 0  # of the line that the chunks so far have not ended
  for chunk in chunks:
    first, *rest = chunk.split(b"\n")
    fragments.append(first)
    size += len(first)
    if rest:
      yield b"".join(fragments)
      yield from rest[:-1]
      fragments, size = [rest[-1]], len(rest[-1])
    elif size > MAX_DOCUMENT_BYTES:
      raise DataError(
        f"{path} has a line of more than {MAX_DOCUMENT_BYTES:,} bytes: one JSON object per line is expected"
      )
  yield b"".join(fragments)


def _text_of_record(line: bytes, text_field: str, location: str) -> str | None:
  try:
    record = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise DataError(f"{location} is not a JSON object: {error}; {ONE_OBJECT_A_LINE}") from None
  if not isinstance(record, dict):
    raise DataError(f"{location} is {_JSON_NAMES[type(record)]}, not a JSON object: {ONE_OBJECT_A_LINE}")
  if text_field not in record:
    fields = ", ".join(record)[:200] or "none"
    raise DataError(
      f"{location} has no field {text_field!r} (its fields: {fields}): set data.text_field to the one that holds text"
    )
  return _check_text(record[text_field], text_field, location)


def _check_text(text: Any, text_field: str, location: str) -> str | None:
  """`text`. Raises DataError unless it is a string of valid Unicode, or null."""
  if text is None:
    return None
  if not isinstance(text, str):
    found = _JSON_NAMES.get(type(text), type(text).__name__)
    raise DataError(
      f"{location}: the field {text_field!r} is {found}, not text: set data.text_field to the one that holds text"
    )
  try:
    text.encode()
  except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
    raise DataError(f"{location}: the field {text_field!r} is not valid Unicode at character {error.start}") from None
  return text


def _read_chunks(file: BinaryIO) -> Iterator[bytes]:
  return iter(lambda: file.read(CHUNK_BYTES), b"")


def _decompress_gzip(file: BinaryIO) -> Iterator[bytes]:
  return _read_chunks(gzip.GzipFile(fileobj=file))  # type: ignore[arg-type]  # has `read`, which is all that is used


def _decompress_zstd(file: BinaryIO) -> Iterator[bytes]:
  try:
    import zstandard
  except ImportError:
    raise DataError(f"{file.name} needs the zstandard package: pip install 'zstandard'") from None
  frame = None  # the library's stream reader accepts a truncated file; a frame knows whether it has ended
  try:
    for chunk in iter(lambda: file.read(1024), b""):  # small, for each byte can expand to 32 KiB
      while chunk:
        frame = frame or zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW).decompressobj()
        yield frame.decompress(chunk)
        chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
  except zstandard.ZstdError as error:
    raise DataError(f"{file.name} is damaged ({error}): fetch or compress it again") from None
  if frame:
    raise EOFError("the last zstd frame has no end")


def _read_parquet(path: pathlib.Path, text_field: str) -> Iterator[Document]:
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError:
    raise DataError(f"{path} needs the pyarrow package: pip install 'pyarrow'") from None
  try:
    with pyarrow.parquet.ParquetFile(path) as table:
      names = table.schema_arrow.names
      if text_field not in names:
        raise DataError(
          f"{path} has no column {text_field!r}, only {', '.join(names)}: set data.text_field to the one that holds text"
        )
      rows, size, num_rows = itertools.count(), path.stat().st_size, max(1, table.metadata.num_rows)
      for batch in table.iter_batches(batch_size=64, columns=[text_field]):
        for scalar in batch.column(0):
          row = next(rows)
          location = f"{path}, row {row}"
          text = _check_text(_parquet_value(scalar, text_field, location), text_field, location)
          yield Document(location, text, size * (row + 1) // num_rows)
  except pyarrow.ArrowException as error:
    raise DataError(f"{path} cannot be read as parquet: {error}") from None


def _parquet_value(scalar: Any, text_field: str, location: str) -> Any:
  """The Python value of a pyarrow scalar; bytes of a binary column as the text that they encode."""
  try:
    value = scalar.as_py()
    return value.decode() if isinstance(value, bytes) else value
  except UnicodeDecodeError as error:
    raise DataError(
      f"{location}: the field {text_field!r} is not UTF-8 at byte {error.start} ({error.object[error.start]:#04x}): "
      "write the column again as UTF-8, or take the file out of data.sources"
    ) from None


READERS: dict[str, Reader] = {
  ".txt": _read_text,
  ".md": _read_text,
  ".py": _read_text,
  ".jsonl": _jsonl_reader(_read_chunks),
  ".jsonl.gz": _jsonl_reader(_decompress_gzip),
  ".jsonl.zst": _jsonl_reader(_decompress_zstd),
  ".parquet": _read_parquet,
}
