"""From config to batches: packed sources, the order of samples, and global batches read ahead.

Nothing here has a state but one integer, the samples consumed: which window sample i is, is a pure function of
(seed, i), so a run resumes exactly, on any number of hosts, and each host reads only its rows.
"""

import dataclasses
import hashlib
import json
import sys

import grain
import numpy as np

from deepseek_jax.data import cache, packed, packing, sources, tokenizer
from deepseek_jax.errors import ConfigError, DataError


class Split:
  """The windows of one split over all sources, one after another: window ids are 0 to len - 1."""

  def __init__(self, parts):
    self._parts = [part for part in parts if len(part)]
    self._ends = np.cumsum([len(part) for part in self._parts])

  def __len__(self):
    return int(self._ends[-1]) if self._parts else 0

  def tokens(self, ids):
    """uint32 [n, seq + 1] of the windows `ids` [n]: inputs are [:, :-1], targets [:, 1:]."""
    return self._gather(ids, lambda part, local: part.tokens(local))

  def bytes(self, ids):
    """int64 [n]: UTF-8 bytes that the targets of each window stand for."""
    return self._gather(ids, lambda part, local: part.bytes(local))

  def _gather(self, ids, read):
    ids = np.asarray(ids, np.int64)
    if ids.size == 0 or ids.min() < 0 or ids.max() >= len(self):
      raise IndexError(f"window ids must be 0 to {len(self) - 1}, at least one of them: got {ids}")
    part = np.searchsorted(self._ends, ids, side="right")
    if (part == part[0]).all():
      return read(self._parts[part[0]], ids - self._start(part[0]))
    first = read(self._parts[part[0]], ids[:1] - self._start(part[0]))
    rows = np.empty((len(ids), *first.shape[1:]), first.dtype)
    for p in np.unique(part):
      rows[part == p] = read(self._parts[p], ids[part == p] - self._start(p))
    return rows

  def _start(self, part):
    return self._ends[part] - len(self._parts[part])


@dataclasses.dataclass(frozen=True)
class Data:
  """What a run trains and evaluates on. `fingerprint` (hex) covers all that decides which tokens sample i has."""

  tokenizer: object
  seq: int
  train: Split
  heldout: Split
  fingerprint: str
  shuffled: grain.MapDataset

  def order(self, first_sample, count):
    """int64 [count]: the train windows that samples first_sample, first_sample + 1, ... are."""
    return np.array([self.shuffled[i] for i in range(first_sample, first_sample + count)], np.int64)


def load_tokenizer(config, vocab):
  """The tokenizer of `config` (a DataConfig). Raises ConfigError when its ids do not fit a model of `vocab` rows."""
  text_tokenizer = tokenizer.load(config.tokenizer)
  if text_tokenizer.vocab > vocab:
    raise ConfigError(
      f"data.tokenizer={config.tokenizer} has ids up to {text_tokenizer.vocab - 1} but model.vocab={vocab}: "
      f"raise model.vocab to at least {text_tokenizer.vocab}"
    )
  return text_tokenizer


def open_data(config, vocab, seed):
  """The Data for `config` (a DataConfig), packed first where the cache does not have it.

  Args: `vocab` of the model; `seed` of the order. Raises ConfigError when ids do not fit `vocab`, DataError for whatever
  is wrong with sources, tokenizer or packed files, and when a split has not one window.
  """
  text_tokenizer = load_tokenizer(config, vocab)
  found = [sources.find(name, cache.root(config) / "objects") for name in config.sources]
  fingerprints, indexes, splits = [], [], []
  for source in found:
    folder, fingerprint, reused = packing.pack(source, text_tokenizer, config)
    index, windows = packed.open_folder(folder, fingerprint, config.seq, config.verify)
    _report(source.name, index, windows, config.seq, f"{'reused from' if reused else 'packed into'} {folder}")
    _check_filled("train", [source], [index], [windows], config)
    fingerprints.append(fingerprint)
    indexes.append(index)
    splits.append(windows)
  _check_filled("heldout", found, indexes, splits, config)
  train, heldout = (Split([windows[split] for windows in splits]) for split in packed.SPLITS)
  sizes = [len(windows["train"]) for windows in splits]
  weights = list(config.weights or sizes)
  facts = json.dumps([fingerprints, weights, seed])
  fingerprint = hashlib.sha256(facts.encode()).hexdigest()
  return Data(text_tokenizer, config.seq, train, heldout, fingerprint, sample_order(sizes, weights, seed))


def sample_order(sizes, weights, seed):
  """A MapDataset without end of window ids, with random access by sample index.

  Each source of `sizes` windows is shuffled anew in every epoch of its own; sources take turns in proportion to `weights`.
  """
  ends = np.cumsum(sizes).tolist()
  seeds = [int(np.random.SeedSequence([seed, i]).generate_state(1)[0]) for i in range(len(sizes))]
  parts = [
    grain.MapDataset.range(end - size, end).seed(s).shuffle().repeat()
    for end, size, s in zip(ends, sizes, seeds, strict=True)
  ]
  return grain.MapDataset.mix(parts, weights) if len(parts) > 1 else parts[0]


def batch_size(train, seq, samples):
  """Sequences in the update that follows `samples` consumed ones, for `train` (a TrainConfig) and `seq` tokens each.

  With a ramp: linear in tokens from batch_ramp_from to global_batch, rounded down to a multiple of microbatch.
  """
  tokens = samples * seq
  if tokens >= train.batch_ramp_tokens:
    return train.global_batch
  rise = (train.global_batch - train.batch_ramp_from) * tokens // train.batch_ramp_tokens
  micro = train.microbatch or train.global_batch
  return (train.batch_ramp_from + rise) // micro * micro


def batches(data, train, samples, steps, place):
  """An iterator over the `steps` updates that follow `samples` consumed ones, two of them read ahead by a thread.

  Yields (place(ids), samples consumed after it), where `ids` int64 [global batch] are windows of data.train. `place` runs
  in that thread: it reads the rows this host needs and puts them on its devices.
  """
  ramp = [samples]  # where each update of the ramp starts, and the first after it; from there all are of one size
  while len(ramp) <= steps and ramp[-1] * data.seq < train.batch_ramp_tokens:
    ramp.append(ramp[-1] + batch_size(train, data.seq, ramp[-1]))

  def start(step):
    in_ramp = min(step, len(ramp) - 1)
    return ramp[in_ramp] + (step - in_ramp) * train.global_batch

  def batch(step):
    first, end = start(step), start(step + 1)
    return place(data.order(first, end - first)), end

  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
  return iter(grain.MapDataset.range(steps).map(batch).to_iter_dataset(options))


def _report(name, index, windows, seq, where):
  counts = f"{len(windows['train']):,} train and {len(windows['heldout']):,} held-out windows of {seq} tokens"
  documents = f"{sum(index['documents'].values()):,} documents, {index['text_bytes'] / 1e6:.1f} MB"
  print(f"data: {name}: {documents}, {counts}, {where}", file=sys.stderr, flush=True)


def _check_filled(split, found, indexes, splits, config):
  """Raises DataError unless `split` has a window in one of the sources `found`."""
  if any(len(windows[split]) for windows in splits):
    return
  tokens = sum(index["files"][f"{split}.tokens"]["size"] for index in indexes) // packed.DTYPE.itemsize
  documents = [sum(index["documents"][s] for index in indexes) for s in (split, *packed.SPLITS)]
  names, change = ", ".join(source.name for source in found), "lower" if split == "train" else "raise"
  raise DataError(
    f"data.sources: {documents[0]} of the {sum(documents[1:])} documents of {names}, {tokens} tokens in all, are in the "
    f"{split} split, where one window takes {config.seq + 1}: add text, {change} data.heldout_fraction (now "
    f"{config.heldout_fraction}), lower data.seq or, as a text file is one document, cut it into several files"
  )
