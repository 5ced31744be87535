"""Documents of a source, tokenised and packed once into a cache folder that later runs reuse."""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import sys

import numpy as np
import rich.console
import rich.progress

from deepseek_jax.data import cache, packed, readers
from deepseek_jax.errors import DataError

BATCH = 1 << 22  # characters tokenised at once: enough for every thread, little enough for memory


def pack(source, tokenizer, config):
  """(folder, fingerprint, reused): where `source` lies packed by `tokenizer` as `config` (a DataConfig) says.

  Built if the cache does not have it, while others that want it wait. In a temporary folder that is renamed when whole, so
  that on file systems without locks two builders at once do no harm. What a killed build leaves is never read, and the
  next build of the same data removes it, given locks. Raises DataError for text that cannot be packed.
  """
  root = cache.root(config)
  try:
    root.mkdir(parents=True, exist_ok=True)
    memo = hashlib.sha256(os.path.abspath(os.path.expanduser(source.name)).encode()).hexdigest()[:16]
    content = source.fingerprint(root / f"hashes-{memo}.json")
    fingerprint = _fingerprint(content, tokenizer, config)
    folder = root / fingerprint[:24]
    if folder.is_dir():
      return folder, fingerprint, True
    with cache.turn(root / f"{folder.name}.lock", f"packs {source.name}") as alone:
      if folder.is_dir():
        return folder, fingerprint, True
      with cache.temporary(folder, alone) as temporary:
        _build(temporary, fingerprint, source, tokenizer, config)
        _rename(temporary, folder)
  except OSError as error:
    raise DataError(
      f"cannot write packed data under {root}: {error.strerror or error}. Make room, or set data.cache to another folder"
    ) from None
  return folder, fingerprint, False


def is_heldout(text, fraction):
  """Whether a document is kept for evaluation: by its content, so that a copy never lands in the other split."""
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  return int.from_bytes(digest, "little") < fraction * 2**64


def _settings(config):
  """What of `config` changes the packed streams."""
  return {"seq": config.seq, "heldout_fraction": config.heldout_fraction, "text_field": config.text_field}


def _fingerprint(content, tokenizer, config):
  facts = [packed.FORMAT, content, tokenizer.fingerprint, _settings(config)]
  return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _build(folder, fingerprint, source, tokenizer, config):
  """Fills `folder` with the packed files of `source`; the index is written last."""
  writers = {split: packed.Writer(folder, split, config.seq) for split in packed.SPLITS}
  text_bytes = 0
  with _progress(f"packing {source.name}", source.size) as update:
    for batch, position in _read_ahead(_batches(source, config.text_field)):
      for text, (ids, byte_counts) in zip(batch, tokenizer.encode_batch(batch), strict=True):
        split = "heldout" if is_heldout(text, config.heldout_fraction) else "train"
        writers[split].add(*_document(ids, byte_counts, tokenizer))
        text_bytes += int(byte_counts.sum())
      update(position)
  files = {name: sizes for writer in writers.values() for name, sizes in writer.close().items()}
  source.check_unchanged()
  facts = {
    "source": source.name,
    "tokenizer": {"name": config.tokenizer, "fingerprint": tokenizer.fingerprint, "vocab": tokenizer.vocab},
    "settings": _settings(config),
    "documents": {split: writer.documents for split, writer in writers.items()},
    "text_bytes": text_bytes,
    "files": files,
  }
  packed.write_index(folder, fingerprint, facts)


def _document(ids, byte_counts, tokenizer):
  """(ids, byte_counts) of a document as it lies in the stream: between bos and eos, or after the one separator."""
  if len(ids) and ids.max() >= tokenizer.vocab:
    raise DataError(f"data.tokenizer gave the id {ids.max()}, beyond its vocabulary of {tokenizer.vocab}")
  ends = [] if tokenizer.eos == tokenizer.bos else [tokenizer.eos]
  around = (1, len(ends))
  return np.concatenate([[tokenizer.bos], ids, ends]).astype(np.uint32), np.pad(byte_counts, around)


def _batches(source, text_field):
  """Yields (texts of about BATCH characters, bytes of the source's files read so far)."""
  texts, size, before = [], 0, 0
  for file in source.files:
    for document in readers.documents(file.path, text_field):
      texts.append(document.text)
      size += len(document.text)
      if size >= BATCH:
        yield texts, before + document.position
        texts, size = [], 0
    before += file.size
  yield texts, before


def _read_ahead(batches):
  """Yields from `batches`, the next of which is read by a thread while one is used."""
  with concurrent.futures.ThreadPoolExecutor(1) as reader:
    pending = reader.submit(next, batches, None)
    while (batch := pending.result()) is not None:
      pending = reader.submit(next, batches, None)
      yield batch


@contextlib.contextmanager
def _progress(what, total):
  """Gives a function of the bytes done: a bar on a terminal; elsewhere one line at the start, and no more."""
  if not sys.stderr.isatty():
    print(f"data: {what} ({total / 1e6:.1f} MB)", file=sys.stderr, flush=True)
    yield lambda done: None
    return
  columns = (rich.progress.TextColumn("data: {task.description}"), rich.progress.BarColumn(),
             rich.progress.DownloadColumn(), rich.progress.TimeRemainingColumn())  # fmt: skip
  with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True)) as bar:
    task = bar.add_task(what, total=total)
    yield lambda done: bar.update(task, completed=done)


def _rename(temporary, folder):
  try:
    temporary.rename(folder)
  except OSError:
    if not folder.is_dir():  # else another process was first: its folder has the same content
      raise
