"""Documents in a file: one reader per suffix. Whatever cannot be read is an error that names file and place.

Text that is not UTF-8 is refused, not repaired: replacing what does not decode would teach the replacement character, and
hide that a whole corpus was saved in another encoding.
"""

import gzip
import itertools
import json
import typing
import zlib

from deepseek_jax.errors import DataError

MAX_DOCUMENT = 1 << 28  # bytes; a document is held in memory whole, and a compressed one can unfold to any size
CHUNK = 1 << 16  # bytes read at once


class Document(typing.NamedTuple):
  """A text, the file (and line) it came from, and how many bytes of that file were read by then."""

  name: str
  text: str
  position: int


def suffix(path):
  """The suffix of `path` that names its reader, or None."""
  return next((s for s in READERS if path.name.lower().endswith(s)), None)


def documents(path, text_field):
  """Yields the Documents of the file at `path` that are not empty. Raises DataError for what cannot be read."""
  try:
    for document in READERS[suffix(path)](path, text_field):
      if document.text:
        yield document
  except OSError as error:
    raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def _read_text(path, text_field):
  size = path.stat().st_size
  if size > MAX_DOCUMENT:
    raise DataError(
      f"{path} is one document of {size:,} bytes, above the limit of {MAX_DOCUMENT:,}: "
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


def _read_lines(unpack):
  """A reader of one JSON object per line, from the chunks of bytes that `unpack(file)` yields."""

  def read(path, text_field):
    with open(path, "rb") as file:
      try:
        for number, line in enumerate(_lines(unpack(file), path), 1):
          if line.strip():
            yield Document(f"{path}:{number}", _text(line, text_field, f"{path}:{number}"), file.tell())
      except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is cut short or damaged ({error}): fetch or compress it again") from None

  return read


def _lines(chunks, path):
  """Yields the lines in `chunks` of bytes, without their line breaks."""
  parts, size = [], 0
  for chunk in chunks:
    first, *rest = chunk.split(b"\n")
    parts.append(first)
    size += len(first)
    if rest:
      yield b"".join(parts)
      yield from rest[:-1]
      parts, size = [rest[-1]], len(rest[-1])
    elif size > MAX_DOCUMENT:
      raise DataError(f"{path} has a line of more than {MAX_DOCUMENT:,} bytes: one JSON object per line is expected")
  yield b"".join(parts)


def _text(line, text_field, name):
  try:
    record = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise DataError(f"{name} is not a JSON object: {error}") from None
  if not isinstance(record, dict) or text_field not in record:
    found = f"the fields {', '.join(record)}" if isinstance(record, dict) else type(record).__name__
    raise DataError(f"{name} has no field {text_field!r}, only {found}: set data.text_field to the one that holds text")
  return _checked(record[text_field], text_field, name)


def _checked(text, text_field, name):
  if not isinstance(text, str):
    raise DataError(f"{name}: the field {text_field!r} should be text, but is {type(text).__name__}")
  try:
    text.encode()
  except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
    raise DataError(f"{name}: the field {text_field!r} is not valid Unicode at character {error.start}") from None
  return text


def _plain(file):
  return iter(lambda: file.read(CHUNK), b"")


def _gunzip(file):
  return _plain(gzip.GzipFile(fileobj=file))


def _unzstd(file):
  try:
    import zstandard
  except ImportError:
    raise DataError(f"{file.name} needs the zstandard package: pip install 'zstandard'") from None
  frame = None  # the library's stream reader takes a cut file for a whole one; a frame knows whether it has ended
  try:
    for chunk in iter(lambda: file.read(1024), b""):  # small, for each byte can unfold to 32 KiB
      while chunk:
        frame = frame or zstandard.ZstdDecompressor().decompressobj()
        yield frame.decompress(chunk)
        chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
  except zstandard.ZstdError as error:
    raise DataError(f"{file.name} is damaged ({error}): fetch or compress it again") from None
  if frame:
    raise EOFError("the last zstd frame has no end")


def _read_parquet(path, text_field):
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
      row, size, rows = itertools.count(), path.stat().st_size, max(1, table.metadata.num_rows)
      for batch in table.iter_batches(batch_size=64, columns=[text_field]):
        for value in batch.column(0).to_pylist():
          name = f"{path}, row {(number := next(row))}"
          yield Document(name, _checked(value, text_field, name), size * (number + 1) // rows)
  except pyarrow.ArrowException as error:
    raise DataError(f"{path} cannot be read as parquet: {error}") from None


READERS = {
  ".txt": _read_text,
  ".md": _read_text,
  ".py": _read_text,
  ".jsonl": _read_lines(_plain),
  ".jsonl.gz": _read_lines(_gunzip),
  ".jsonl.zst": _read_lines(_unzstd),
  ".parquet": _read_parquet,
}
