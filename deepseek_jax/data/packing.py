"""Documents of a source, tokenized and packed once into a cache folder that later runs reuse."""

import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.config_sections import DataConfig
from deepseek_jax.console import current_console
from deepseek_jax.data import cache, packed_dataset, readers
from deepseek_jax.data.sources import Source
from deepseek_jax.data.splitting import Split, plan_split, split_text, text_hash
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import DataError

BATCH_CHARACTERS = 1 << 22  # tokenized at once: enough for every thread, little enough for memory
SAMPLE_CHARACTERS = 1 << 16  # from which the number of characters of a token is estimated


class PackedSource(NamedTuple):
  """A source in the cache: its folder, the hash of its text in hex, and whether an earlier run packed it.

  in_pieces: its documents were cut into pieces.
  """

  folder: pathlib.Path
  content_hash: str
  reused: bool
  in_pieces: bool


def pack_source(source: Source, tokenizer: Tokenizer, config: DataConfig, in_pieces: bool = False) -> PackedSource:
  """Packs `source` into the cache, unless it is there already. in_pieces: cut its documents, see `splitting`.

  - Processes that want the same data wait for the one that packs it.
  - The data is written to a temporary folder, which is renamed when complete. So two processes that pack the same data
    do no harm on a file system without locks.
  - What a killed process leaves is never read. The next one to pack the same data removes it, given locks.

  Raises DataError for text that cannot be packed.
  """
  root = cache.cache_root(config)
  try:
    root.mkdir(parents=True, exist_ok=True)
    source_hash = hashlib.sha256(os.path.abspath(os.path.expanduser(source.name)).encode()).hexdigest()[:16]
    content_hash = source.fingerprint(root / f"hashes-{source_hash}.json")
    fingerprint = source_fingerprint(content_hash, tokenizer, config, in_pieces)
    folder = root / fingerprint[:24]
    if folder.is_dir():
      return PackedSource(folder, content_hash, True, in_pieces)
    with cache.exclusive_lock(root / f"{folder.name}.lock", f"packs {source.name}") as locked:
      if folder.is_dir():
        return PackedSource(folder, content_hash, True, in_pieces)
      with cache.temporary_folder(folder, remove_stale=locked) as temporary:
        _write_packed(temporary, fingerprint, source, tokenizer, config, in_pieces)
        cache.rename_unless_exists(temporary, folder)
  except OSError as error:
    raise DataError(
      f"cannot write packed data under {root}: {error.strerror or error}. Make room, or set data.cache to another folder"
    ) from None
  return PackedSource(folder, content_hash, False, in_pieces)


def is_heldout(text: str, fraction: float) -> bool:
  """Whether a document is in the held-out split: by a hash of its content, so that a copy is in the same split."""
  return int.from_bytes(text_hash(text), "little") < fraction * 2**64


def _packing_settings(config: DataConfig, in_pieces: bool) -> dict[str, Any]:
  """The settings that change the packed streams."""
  settings = {"seq": config.seq, "heldout_fraction": config.heldout_fraction, "text_field": config.text_field}
  # Settings of later versions are there only where they are on, so that fingerprints of older data stay.
  return settings | ({"skip_null": True} if config.skip_null else {}) | ({"pieces": True} if in_pieces else {})


def source_fingerprint(content_hash: str, tokenizer: Tokenizer, config: DataConfig, in_pieces: bool = False) -> str:
  """Hex hash of everything that decides the packed files of a source whose text has `content_hash`."""
  content = [packed_dataset.FORMAT, content_hash, tokenizer.fingerprint, _packing_settings(config, in_pieces)]
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _write_packed(
  folder: pathlib.Path, fingerprint: str, source: Source, tokenizer: Tokenizer, config: DataConfig, in_pieces: bool
) -> None:
  """Fills `folder` with the packed files of `source`; the index is written last."""
  pieces = _plan_pieces(source, tokenizer, config) if in_pieces else None
  writers = {split: packed_dataset.PackedSplitWriter(folder, split, config.seq) for split in packed_dataset.SPLITS}
  text_bytes = num_null = 0
  with current_console().byte_progress(f"data: packing {source.name}", source.size) as update:
    for texts, null, bytes_read in _prefetch_one(_text_batches(source, config, pieces)):
      num_null += null
      for text, (ids, byte_counts) in zip(texts, tokenizer.encode_batch(texts), strict=True):
        heldout = pieces.is_heldout(text) if pieces else is_heldout(text, config.heldout_fraction)
        writers["heldout" if heldout else "train"].add(*_add_bos_eos(ids, byte_counts, tokenizer))
        text_bytes += int(byte_counts.sum())
      update(bytes_read)
  files = {name: checksums for writer in writers.values() for name, checksums in writer.close().items()}
  source.check_unchanged()
  metadata = {
    "source": source.name,
    "tokenizer": {"name": config.tokenizer, "fingerprint": tokenizer.fingerprint, "vocab": tokenizer.vocab},
    "settings": _packing_settings(config, in_pieces),
    "documents": {split: writer.num_documents for split, writer in writers.items()},
    "cut_documents": pieces.num_documents if pieces else 0,  # `documents` counts their pieces
    "null_records": num_null,
    "text_bytes": text_bytes,
    "files": files,
  }
  packed_dataset.write_index(folder, fingerprint, metadata)


def _add_bos_eos(ids: np.ndarray, byte_counts: np.ndarray, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
  """(ids uint32, byte_counts) of a document in the stream: between bos and eos, or after bos where both are one."""
  if len(ids) and ids.max() >= tokenizer.vocab:
    raise DataError(f"data.tokenizer gave the id {ids.max()}, beyond its vocabulary of {tokenizer.vocab}")
  eos = [] if tokenizer.eos == tokenizer.bos else [tokenizer.eos]
  padding = (1, len(eos))
  return np.concatenate([[tokenizer.bos], ids, eos]).astype(np.uint32), np.pad(byte_counts, padding)


def _plan_pieces(source: Source, tokenizer: Tokenizer, config: DataConfig) -> Split:
  """How the documents of `source` are cut so that both splits have a window, if there is text enough."""

  def read_texts() -> Iterator[str]:
    for texts, *_ in _text_batches(source, config, None):
      yield from texts

  sample = next(read_texts(), "")[:SAMPLE_CHARACTERS]
  characters_per_token = len(sample) / max(len(tokenizer.encode(sample)), 1)
  # Half as much again as a window takes on average: tokens differ in length.
  return plan_split(read_texts, config.heldout_fraction, int(1.5 * characters_per_token * (config.seq + 1)) + 1)


def _text_batches(source: Source, config: DataConfig, pieces: Split | None) -> Iterator[tuple[list[str], int, int]]:
  """Yields (texts of about BATCH_CHARACTERS together, null records, bytes of the source's files read so far).

  The texts are documents, or their `pieces`. Records count since the last batch.
  """
  texts: list[str] = []
  num_characters = num_null = previous_files = 0
  for file in source.files:
    for document in readers.read_documents(file.path, config.text_field, config.skip_null):
      if document.text is None:
        num_null += 1
        continue
      texts += split_text(document.text, pieces.piece_characters) if pieces else [document.text]
      num_characters += len(document.text)
      if num_characters >= BATCH_CHARACTERS:
        yield texts, num_null, previous_files + document.bytes_read
        texts, num_characters, num_null = [], 0, 0
    previous_files += file.size
  yield texts, num_null, previous_files


def _prefetch_one(batches: Iterator[tuple[list[str], int, int]]) -> Iterator[tuple[list[str], int, int]]:
  """Yields from `batches`; a thread reads the next one while the caller works on one."""
  with concurrent.futures.ThreadPoolExecutor(1) as reader:
    pending = reader.submit(next, batches, None)
    while (batch := pending.result()) is not None:
      pending = reader.submit(next, batches, None)
      yield batch
