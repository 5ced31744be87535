"""A folder of packed windows: its files, its index, and reading it with everything checked.

`<split>.tokens` is one flat stream of uint32 ids; window i is `stream[i * seq : i * seq + seq + 1]`, so that each token
but the first is a target exactly once. `<split>.bytes` has one uint32 per window: the UTF-8 bytes of its seq targets.
`index.json` has the size and CRC-32 of each, what the data was made from, and a checksum of itself.
"""

import json
import os
import pathlib
import zlib
from typing import Any

import numpy as np

from deepseek_jax.data.cache import write_atomically
from deepseek_jax.errors import DataError

FORMAT = 1  # raised when files of an older version must not be read
SPLITS = ("train", "heldout")
DTYPE = np.dtype("<u4")
CHUNK_TOKENS = 1 << 24  # of a stream that are searched at once


class PackedSplit:
  """The windows of one split of one source, memory-mapped: reading copies only the windows that are asked for."""

  def __init__(self, folder: pathlib.Path, split: str, seq: int):
    self.num_targets = max(0, os.path.getsize(folder / f"{split}.tokens") // DTYPE.itemsize - 1)
    self._num_windows, self._seq = self.num_windows(seq), seq
    if self._num_windows:  # an empty file cannot be mapped
      stream = np.asarray(np.memmap(folder / f"{split}.tokens", DTYPE, "r"))
      self._stream = stream
      self._tokens = np.lib.stride_tricks.sliding_window_view(stream, seq + 1)[::seq]
      self._target_bytes = np.asarray(np.memmap(folder / f"{split}.bytes", DTYPE, "r"))

  def __len__(self) -> int:
    return self._num_windows

  def num_windows(self, seq: int) -> int:
    """How many windows of `seq` targets the stream has; it does not depend on the length that it was packed for."""
    return self.num_targets // seq

  def tokens(self, window_ids: np.ndarray) -> np.ndarray:
    """uint32 [n, seq + 1] of the windows `window_ids` [n]."""
    return self._tokens[window_ids]

  def target_bytes(self, window_ids: np.ndarray) -> np.ndarray:
    """int64 [n]: UTF-8 bytes of the targets of the windows `window_ids` [n]."""
    return self._target_bytes[window_ids].astype(np.int64)

  def longest_documents(self, bos: int) -> np.ndarray:
    """int64 [windows]: tokens of the longest document that each window has a part of; `bos` starts each document."""
    chunks = range(0, len(self._stream), CHUNK_TOKENS)
    starts = np.concatenate(
      [start + np.flatnonzero(self._stream[start : start + CHUNK_TOKENS] == bos) for start in chunks]
    )
    lengths = np.diff(starts, append=len(self._stream))
    edges = np.arange(len(self) + 1) * self._seq
    first, last = np.searchsorted(starts, edges[:-1], "right") - 1, np.searchsorted(starts, edges[1:], "left")
    # reduceat takes pairs: the documents first to last of each window, and what is between two pairs, which is left out.
    pairs = np.stack([first, last], -1).reshape(-1)
    return np.maximum.reduceat(np.append(lengths, 0), pairs)[::2]


class PackedSplitWriter:
  """Writes the two files of one split, window by window, with their checksums."""

  FLUSH_TOKENS = 1 << 20  # byte counts that are buffered before they are summed by window

  def __init__(self, folder: pathlib.Path, split: str, seq: int):
    self._seq = seq
    self._files = {name: _ChecksummedFile(folder / name) for name in (f"{split}.tokens", f"{split}.bytes")}
    self._token_file, self._bytes_file = self._files.values()
    self._byte_counts: list[np.ndarray] = []
    self._num_buffered = 0
    self.num_documents = 0

  def add(self, ids: np.ndarray, byte_counts: np.ndarray) -> None:
    """Appends one document: its `ids` [n], bos and eos included, and the UTF-8 bytes [n] that each stands for."""
    self._token_file.write(ids)
    # The first token of a stream is no window's target.
    self._byte_counts.append(byte_counts if self.num_documents else byte_counts[1:])
    self._num_buffered += len(self._byte_counts[-1])
    self.num_documents += 1
    if self._num_buffered >= max(self.FLUSH_TOKENS, self._seq):
      self._flush()

  def close(self) -> dict[str, dict[str, int]]:
    """Closes the files; returns name -> {size, crc32}. Targets that fill no window have no byte count."""
    self._flush()
    return {name: file.close() for name, file in self._files.items()}

  def _flush(self) -> None:
    counts = np.concatenate([*self._byte_counts, np.zeros(0, np.int64)])
    end = len(counts) // self._seq * self._seq
    self._bytes_file.write(counts[:end].reshape(-1, self._seq).sum(1))
    self._byte_counts, self._num_buffered = [counts[end:]], len(counts) - end


class _ChecksummedFile:
  def __init__(self, path: pathlib.Path):
    self._file, self._size, self._crc = open(path, "wb"), 0, 0

  def write(self, array: np.ndarray) -> None:
    data = array.astype(DTYPE).tobytes()
    self._file.write(data)
    self._size, self._crc = self._size + len(data), zlib.crc32(data, self._crc)

  def close(self) -> dict[str, int]:
    self._file.flush()
    os.fsync(self._file.fileno())
    self._file.close()
    return {"size": self._size, "crc32": self._crc}


def open_packed(
  folder: pathlib.Path, fingerprint: str, seq: int, verify: bool
) -> tuple[dict[str, Any], dict[str, PackedSplit]]:
  """(index, {split name: PackedSplit}) of the packed `folder`.

  Raises DataError, naming the file, if one is missing, truncated, of another format or, with `verify`, of other
  content.
  """
  index = read_index(folder, fingerprint)
  for name in (f"{split}.{kind}" for split in SPLITS for kind in ("tokens", "bytes")):
    path, expected = folder / name, index["files"][name]
    try:
      size = path.stat().st_size
      crc = _crc32_of_file(path) if verify and size == expected["size"] else expected["crc32"]
    except OSError as error:
      raise _damaged(path, error.strerror) from None
    if size != expected["size"]:
      raise _damaged(path, f"{expected['size']:,} bytes expected, got {size:,}")
    if crc != expected["crc32"]:
      raise _damaged(path, f"checksum {expected['crc32']:08x} expected, got {crc:08x}")
  splits = {split: PackedSplit(folder, split, seq) for split in SPLITS}
  for name, split in splits.items():
    if index["files"][f"{name}.bytes"]["size"] != len(split) * DTYPE.itemsize:
      raise _damaged(folder / f"{name}.bytes", f"{len(split):,} windows expected")
  return index, splits


def write_index(folder: pathlib.Path, fingerprint: str, metadata: dict[str, Any]) -> None:
  """Writes index.json of `folder`: `metadata` (JSON), the format, the data's `fingerprint` and a checksum of these."""
  index = {"format": FORMAT, "fingerprint": fingerprint, **metadata}
  write_atomically(folder / "index.json", json.dumps(index | {"crc32": _index_crc32(index)}, indent=2))


def read_index(folder: pathlib.Path, fingerprint: str) -> dict[str, Any]:
  """index.json of `folder`.

  Raises DataError if it is damaged, of another format, or of data with another `fingerprint`.
  """
  path = folder / "index.json"
  try:
    index = json.loads(path.read_bytes())
    if index.pop("crc32") != _index_crc32(index):
      raise ValueError("its checksum is of other content")
  except OSError as error:
    raise _damaged(path, error.strerror) from None
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise _damaged(path, f"not a complete index: {error!r}") from None
  if (index.get("format"), index.get("fingerprint")) != (FORMAT, fingerprint):
    raise _damaged(path, f"format {FORMAT} and fingerprint {fingerprint[:16]}... expected")
  return index


def _index_crc32(index: dict[str, Any]) -> int:
  return zlib.crc32(json.dumps(index, sort_keys=True).encode())


def _crc32_of_file(path: pathlib.Path) -> int:
  crc = 0
  with open(path, "rb") as file:
    while chunk := file.read(1 << 22):
      crc = zlib.crc32(chunk, crc)
  return crc


def _damaged(path: pathlib.Path, reason: str | None) -> DataError:
  return DataError(
    f"packed data is damaged: {path}: {reason}. Delete the folder {path.parent}; the next run packs the data again"
  )
