"""A folder of packed windows: its files, its index, and reading it with everything checked.

`<split>.tokens` is one flat stream of uint32 ids; window i is `stream[i * seq : i * seq + seq + 1]`, so that each token
but the first is a target exactly once. `<split>.bytes` has one uint32 per window: the UTF-8 bytes of its seq targets.
`index.json` has the size and CRC-32 of each, what the data was made from, and a checksum of itself.
"""

import json
import os
import zlib

import numpy as np

from deepseek_jax.data.cache import write_atomically
from deepseek_jax.errors import DataError

FORMAT = 1  # raised when files of an older version must not be read
SPLITS = ("train", "heldout")
DTYPE = np.dtype("<u4")


class Windows:
  """The windows of one split of one source, mapped from disk: reading costs a copy of what is asked for."""

  def __init__(self, folder, split, seq):
    size = os.path.getsize(folder / f"{split}.tokens") // DTYPE.itemsize
    self._count = max(0, size - 1) // seq
    if self._count:  # an empty file cannot be mapped
      stream = np.asarray(np.memmap(folder / f"{split}.tokens", DTYPE, "r"))
      self._tokens = np.lib.stride_tricks.sliding_window_view(stream, seq + 1)[::seq]
      self._bytes = np.asarray(np.memmap(folder / f"{split}.bytes", DTYPE, "r"))

  def __len__(self):
    return self._count

  def tokens(self, ids):
    """uint32 [n, seq + 1] of the windows `ids` [n]."""
    return self._tokens[ids]

  def bytes(self, ids):
    """int64 [n]: UTF-8 bytes of the targets of the windows `ids` [n]."""
    return self._bytes[ids].astype(np.int64)


class Writer:
  """Writes the two files of one split, window by window, with their checksums."""

  FLUSH = 1 << 20  # byte counts kept before they are summed by window

  def __init__(self, folder, split, seq):
    self._seq = seq
    self._files = {name: _File(folder / name) for name in (f"{split}.tokens", f"{split}.bytes")}
    self._tokens, self._bytes = self._files.values()
    self._counts, self._pending = [], 0
    self.documents = 0

  def add(self, ids, byte_counts):
    """Appends one document: its `ids` [n], bos and eos included, and the bytes [n] that each stands for."""
    self._tokens.write(ids)
    # The first token of a stream is no window's target.
    self._counts.append(byte_counts if self.documents else byte_counts[1:])
    self._pending += len(self._counts[-1])
    self.documents += 1
    if self._pending >= max(self.FLUSH, self._seq):
      self._flush()

  def close(self):
    """Ends the files; returns name -> {size, crc32}. Targets that fill no window have no byte count."""
    self._flush()
    return {name: file.close() for name, file in self._files.items()}

  def _flush(self):
    counts = np.concatenate([*self._counts, np.zeros(0, np.int64)])
    whole = len(counts) // self._seq * self._seq
    self._bytes.write(counts[:whole].reshape(-1, self._seq).sum(1))
    self._counts, self._pending = [counts[whole:]], len(counts) - whole


class _File:
  def __init__(self, path):
    self._file, self._size, self._crc = open(path, "wb"), 0, 0

  def write(self, array):
    data = array.astype(DTYPE).tobytes()
    self._file.write(data)
    self._size, self._crc = self._size + len(data), zlib.crc32(data, self._crc)

  def close(self):
    self._file.flush()
    os.fsync(self._file.fileno())
    self._file.close()
    return {"size": self._size, "crc32": self._crc}


def open_folder(folder, fingerprint, seq, verify):
  """(index, {split: Windows}) of the packed `folder`.

  Raises DataError, naming the file, if one is missing, cut, of another format or, with `verify`, of other content.
  """
  index = read_index(folder, fingerprint)
  for name in (f"{split}.{kind}" for split in SPLITS for kind in ("tokens", "bytes")):
    path, expected = folder / name, index["files"][name]
    try:
      size = path.stat().st_size
      crc = _crc32(path) if verify and size == expected["size"] else expected["crc32"]
    except OSError as error:
      raise _damaged(path, error.strerror) from None
    if size != expected["size"]:
      raise _damaged(path, f"{expected['size']:,} bytes expected, {size:,} found")
    if crc != expected["crc32"]:
      raise _damaged(path, f"checksum {expected['crc32']:08x} expected, {crc:08x} found")
  splits = {split: Windows(folder, split, seq) for split in SPLITS}
  for split, windows in splits.items():
    if index["files"][f"{split}.bytes"]["size"] != len(windows) * DTYPE.itemsize:
      raise _damaged(folder / f"{split}.bytes", f"{len(windows):,} windows expected")
  return index, splits


def write_index(folder, fingerprint, facts):
  """Writes `facts` (JSON), the format, the `fingerprint` of the data and a checksum of all that as the index of `folder`."""
  index = {"format": FORMAT, "fingerprint": fingerprint, **facts}
  write_atomically(folder / "index.json", json.dumps(index | {"crc32": _index_crc32(index)}, indent=2))


def read_index(folder, fingerprint):
  """The index of `folder` as a dict, checked to be whole, of this format, and for data with this `fingerprint`."""
  path = folder / "index.json"
  try:
    index = json.loads(path.read_bytes())
    if index.pop("crc32") != _index_crc32(index):
      raise ValueError("its checksum is of other content")
  except OSError as error:
    raise _damaged(path, error.strerror) from None
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise _damaged(path, f"not a whole index: {error!r}") from None
  if (index.get("format"), index.get("fingerprint")) != (FORMAT, fingerprint):
    raise _damaged(path, f"format {FORMAT} and fingerprint {fingerprint[:16]}... expected")
  return index


def _index_crc32(index):
  return zlib.crc32(json.dumps(index, sort_keys=True).encode())


def _crc32(path):
  crc = 0
  with open(path, "rb") as file:
    while chunk := file.read(1 << 22):
      crc = zlib.crc32(chunk, crc)
  return crc


def _damaged(path, found):
  return DataError(f"packed data is damaged: {path}: {found}. Delete the folder {path.parent}; it is built again")
