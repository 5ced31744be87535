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


class Document(NamedTuple):
  """A text, its file (and line), and how many bytes of that file had been read when it was complete."""

  location: str
  text: str
  bytes_read: int


Reader = Callable[[pathlib.Path, str], Iterator[Document]]  # (path, text_field) -> documents


def reader_suffix(path: pathlib.PurePath) -> str | None:
  """The suffix of `path` that names its reader; None where there is no reader."""
  return next((s for s in READERS if path.name.lower().endswith(s)), None)


def read_documents(path: pathlib.Path, text_field: str) -> Iterator[Document]:
  """Yields the documents of the file at `path` that are not empty. Raises DataError for what cannot be read."""
  try:
    for document in READERS[str(reader_suffix(path))](path, text_field):
      if document.text:
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


def _text_of_record(line: bytes, text_field: str, location: str) -> str:
  try:
    record = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise DataError(f"{location} is not a JSON object: {error}") from None
  if not isinstance(record, dict) or text_field not in record:
    fields = f"the fields {', '.join(record)}" if isinstance(record, dict) else type(record).__name__
    raise DataError(
      f"{location} has no field {text_field!r}, only {fields}: set data.text_field to the one that holds text"
    )
  return _check_text(record[text_field], text_field, location)


def _check_text(text: Any, text_field: str, location: str) -> str:
  """`text`. Raises DataError unless it is a string of valid Unicode."""
  if not isinstance(text, str):
    raise DataError(f"{location}: the field {text_field!r} should be text, but is {type(text).__name__}")
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
        frame = frame or zstandard.ZstdDecompressor().decompressobj()
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
        for value in batch.column(0).to_pylist():
          row = next(rows)
          location = f"{path}, row {row}"
          yield Document(location, _check_text(value, text_field, location), size * (row + 1) // num_rows)
  except pyarrow.ArrowException as error:
    raise DataError(f"{path} cannot be read as parquet: {error}") from None


READERS: dict[str, Reader] = {
  ".txt": _read_text,
  ".md": _read_text,
  ".py": _read_text,
  ".jsonl": _jsonl_reader(_read_chunks),
  ".jsonl.gz": _jsonl_reader(_decompress_gzip),
  ".jsonl.zst": _jsonl_reader(_decompress_zstd),
  ".parquet": _read_parquet,
}
