"""From config to batches: packed sources, the order of samples, and global batches read ahead.

The only state is the samples and tokens consumed. Which window sample i is, is a pure function of (seed, seq, i), and in a
stage of training of what the stages before it take (`regions`). So a run resumes exactly, on any number of hosts, and each host reads only its rows. A run that goes on with another `data.seq`
goes on with the sample of the same index, in the order of the new windows.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from deepseek_jax.config_sections import TOKENIZER_SIZES, DataConfig, TrainConfig
from deepseek_jax.console import current_console, format_bytes
from deepseek_jax.data import cache, packed_dataset, packing, readers, sources
from deepseek_jax.data.packed_dataset import PackedSplit
from deepseek_jax.data.regions import ConcatRanges, Region, region_windows, take_region
from deepseek_jax.data.tokenizer import Tokenizer, load_model_tokenizer
from deepseek_jax.errors import DataError


class Consumed(NamedTuple):
  """What a run has trained on. The sequences need not all be of one length."""

  samples: int = 0  # sequences
  tokens: int = 0  # targets in these sequences


class Share(NamedTuple):
  """What a stage of training takes of its sources.

  first_sample, samples: of the run, when the stage starts; and how many it takes.
  taken: {content hash of a source: targets of it that earlier stages took}.
  """

  first_sample: int
  samples: int
  taken: Mapping[str, int]


class ConcatSplit:
  """The windows of one split over all sources, one source after another: window ids are 0 to len - 1."""

  def __init__(self, splits: Sequence[PackedSplit]):
    self._splits = [split for split in splits if len(split)]
    self._ends = np.cumsum([len(split) for split in self._splits])

  def __len__(self) -> int:
    return int(self._ends[-1]) if self._splits else 0

  def tokens(self, window_ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """uint32 [n, seq + 1] of the windows `window_ids` [n]: inputs are [:, :-1], targets [:, 1:]."""
    return self._gather(window_ids, PackedSplit.tokens)

  def target_bytes(self, window_ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """int64 [n]: UTF-8 bytes that the targets of each window stand for."""
    return self._gather(window_ids, PackedSplit.target_bytes)

  def _gather(
    self, window_ids: Sequence[int] | np.ndarray, read: Callable[[PackedSplit, np.ndarray], np.ndarray]
  ) -> np.ndarray:
    ids = np.asarray(window_ids, np.int64)
    if ids.size == 0 or ids.min() < 0 or ids.max() >= len(self):
      raise IndexError(f"window ids must be 0 to {len(self) - 1}, at least one of them: got {ids}")
    source = np.searchsorted(self._ends, ids, side="right")  # [n], index into self._splits
    if (source == source[0]).all():
      return read(self._splits[source[0]], ids - self._start(source[0]))
    first = read(self._splits[source[0]], ids[:1] - self._start(source[0]))
    rows = np.empty((len(ids), *first.shape[1:]), first.dtype)
    for s in np.unique(source):
      rows[source == s] = read(self._splits[s], ids[source == s] - self._start(s))
    return rows

  def _start(self, source: int) -> int:
    """Window id of the first window of a source."""
    return self._ends[source] - len(self._splits[source])


@dataclasses.dataclass(frozen=True)
class Data:
  """What a run trains and evaluates on.

  heldout_windows: of each source in order, its name and the window ids of `heldout` that are its own.
  fingerprint_at: seq -> hex hash of everything that decides which tokens sample i of that length has.
  shuffled_ids: maps a sample index to a window id of `train`; it has no end.
  first_sample: the sample of the run that has index 0 there.
  regions: what a stage takes of each source; empty for a run without stages.
  taken: as in Share, once a stage has taken its own.
  repeated_targets: of the regions, how many earlier stages or epochs have consumed.
  """

  tokenizer: Tokenizer
  seq: int
  train: ConcatSplit
  heldout: ConcatSplit
  heldout_windows: tuple[tuple[str, range], ...]
  fingerprint_at: Callable[[int], str]
  shuffled_ids: grain.MapDataset
  first_sample: int = 0
  regions: tuple[Region, ...] = ()
  taken: Mapping[str, int] = dataclasses.field(default_factory=dict)
  repeated_targets: int = 0

  @functools.cached_property
  def fingerprint(self) -> str:
    """`fingerprint_at` the length that this data has."""
    return self.fingerprint_at(self.seq)

  def window_ids(self, first_sample: int, count: int) -> np.ndarray:
    """int64 [count]: the windows of `train` that samples first_sample, first_sample + 1, ... are.

    Raises DataError for samples before those of the stage.
    """
    first = first_sample - self.first_sample
    if first < 0:
      raise DataError(
        f"sample {first_sample:,} is of an earlier stage than the one that starts with sample {self.first_sample:,}: put "
        "until_tokens, batch and length of the stages before back"
      )
    return np.array([self.shuffled_ids[i] for i in range(first, first + count)], np.int64)


@dataclasses.dataclass(frozen=True)
class OpenSource:
  """A packed source: its index, and its splits by name."""

  source: sources.Source
  packed: packing.PackedSource
  index: dict[str, Any]
  splits: dict[str, PackedSplit]


def open_data(config: DataConfig, vocab: int, seed: int, share: Share | None = None) -> Data:
  """The Data for `config`, packed first where the cache does not have it.

  Args:
    vocab: of the model.
    seed: of the order.
    share: of a stage of training; None: all windows, without end.

  Raises ConfigError when ids do not fit `vocab`, and DataError for anything wrong with sources, tokenizer or packed files,
  for a split without a window, and in a stage for text whose documents would be cut into pieces, other ones at each length.
  """
  tokenizer = load_model_tokenizer(config.tokenizer, vocab)
  if not tokenizer.add_bos_token and tokenizer.bos != tokenizer.eos and config.tokenizer not in TOKENIZER_SIZES:
    current_console().print(
      "note     add_bos_token=false beside data.tokenizer is about prompts: documents begin with bos (a null bos_token: with eos)"
    )
  opened = _open_sources(config, tokenizer)
  splits = [source.splits for source in opened]
  train, heldout = (ConcatSplit([source_splits[name] for source_splits in splits]) for name in packed_dataset.SPLITS)

  heldout_ends = np.cumsum([len(source_splits["heldout"]) for source_splits in splits]).tolist()
  heldout_windows = tuple(
    (source.source.name, range(end - len(source.splits["heldout"]), end))
    for source, end in zip(opened, heldout_ends, strict=True)
  )

  def sizes(seq: int) -> list[int]:
    return [source_splits["train"].num_windows(seq) for source_splits in splits]

  def fingerprint_at(seq: int) -> str:
    at_seq = dataclasses.replace(config, seq=seq)
    fingerprints = [
      packing.source_fingerprint(source.packed.content_hash, tokenizer, at_seq, source.packed.in_pieces)
      for source in opened
    ]
    order = [
      fingerprints,
      list(config.weights or sizes(seq)),
      seed,
      *([config.order] if config.order != "shuffled" else []),
    ]
    return hashlib.sha256(json.dumps(order).encode()).hexdigest()

  weights = config.weights or tuple(sizes(config.seq))
  data = Data(tokenizer, config.seq, train, heldout, heldout_windows, fingerprint_at, grain.MapDataset.range(0))
  if share:
    data = _take_share(data, opened, weights, share)
  return dataclasses.replace(data, shuffled_ids=_order_samples(data, opened, config, weights, seed))


def _take_share(data: Data, opened: Sequence[OpenSource], weights: Sequence[float], share: Share) -> Data:
  """`data` with the regions that `share` takes of the `opened` sources, which are mixed in proportion to `weights`."""
  if in_pieces := [source.source.name for source in opened if source.packed.in_pieces]:
    raise DataError(
      f"data.sources: {', '.join(in_pieces)}: too few documents to hold some out at data.seq={data.seq}, and stages of training "
      "take whole ones: add text, lower data.seq, or raise data.heldout_fraction"
    )
  taken, regions, repeated = dict(share.taken), [], 0
  for source, weight in zip(opened, weights, strict=True):
    num_targets, content = source.splits["train"].num_targets, source.packed.content_hash
    windows = math.ceil(share.samples * weight / sum(weights)) + 1  # the mixture deviates by less than one
    region = take_region(taken.get(content, 0), windows, num_targets, data.seq)
    taken[content], repeated = region.end, repeated + region.repeated(num_targets)
    regions.append(region)
  return dataclasses.replace(
    data, first_sample=share.first_sample, regions=tuple(regions), taken=taken, repeated_targets=repeated
  )


def _order_samples(
  data: Data, opened: Sequence[OpenSource], config: DataConfig, weights: Sequence[float], seed: int
) -> grain.MapDataset:
  """The windows of each source in the order of the config, mixed in proportion to `weights`; see `shuffle_and_mix`."""
  splits = [source.splits["train"] for source in opened]
  if not data.regions and config.order == "shuffled":
    return shuffle_and_mix([len(split) for split in splits], weights, seed)
  regions = data.regions or [Region(0, split.num_targets) for split in splits]
  starts, counts, first = [], [], 0  # of ranges of window ids, by source
  for split, region in zip(splits, regions, strict=True):
    ranges = region_windows(region, split.num_targets, config.seq)
    ids, lengths = np.array([[r.start, len(r)] for r in ranges], np.int64).reshape(-1, 2).T
    if config.order == "by_length" and ranges:
      windows = np.concatenate([np.arange(r.start, r.stop) for r in ranges])
      longest = split.longest_documents(data.tokenizer.bos)[windows]
      ids, lengths = windows[np.argsort(longest, kind="stable")], np.ones(len(windows), np.int64)
    starts.append(first + ids)
    counts.append(lengths)
    first += len(split)
  sizes = [int(lengths.sum()) for lengths in counts]
  order = shuffle_and_mix(sizes, weights, seed, shuffle=config.order == "shuffled")
  return order.map(ConcatRanges(np.concatenate(starts), np.concatenate(counts)).__getitem__)


def _open_sources(config: DataConfig, tokenizer: Tokenizer) -> list[OpenSource]:
  """The sources of `config`, packed. Raises DataError where too little text is in a split.

  Documents are whole where both splits have a window so. Else those of a source without one for training are cut into
  pieces; where no source has one that is held out, those of all.
  """

  def open_source(source: sources.Source, in_pieces: bool) -> OpenSource:
    packed = packing.pack_source(source, tokenizer, config, in_pieces)
    fingerprint = packing.source_fingerprint(packed.content_hash, tokenizer, config, in_pieces)
    index, splits = packed_dataset.open_packed(packed.folder, fingerprint, config.seq, config.verify)
    return OpenSource(source, packed, index, splits)

  opened = []
  for name in config.sources:
    source = sources.find_source(name, cache.cache_root(config) / "objects")
    # A single document is in one split, and the other is empty: it need not be packed whole to know.
    single = len(config.sources) == len(source.files) == 1 and readers.is_one_document(source.files[0].path)
    opened.append(open_source(source, in_pieces=single))
    if not opened[-1].splits["train"] and not single:
      opened[-1] = open_source(source, in_pieces=True)
    _check_not_empty("train", opened[-1:], config)
  if not any(s.splits["heldout"] for s in opened):
    opened = [s if s.packed.in_pieces else open_source(s.source, in_pieces=True) for s in opened]
  for opened_source in opened:
    _print_summary(opened_source, config.seq)
  for split in packed_dataset.SPLITS:
    _check_not_empty(split, opened, config)
  return opened


def shuffle_and_mix(
  sizes: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool = True
) -> grain.MapDataset:
  """An endless MapDataset from sample index to window id, with random access.

  Each source of `sizes` windows is shuffled again in every epoch of its own, unless `shuffle` is false. Sources are mixed
  in proportion to `weights`.
  """
  ends = np.cumsum(sizes).tolist()
  seeds = [int(np.random.SeedSequence([seed, i]).generate_state(1)[0]) for i in range(len(sizes))]
  ranges = [grain.MapDataset.range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
  datasets = [
    (dataset.seed(s).shuffle() if shuffle else dataset).repeat() for dataset, s in zip(ranges, seeds, strict=True)
  ]
  return grain.MapDataset.mix(datasets, weights) if len(datasets) > 1 else datasets[0]


def batch_size(train: TrainConfig, tokens: int) -> int:
  """Sequences in the update that follows `tokens` consumed ones.

  With a ramp: linear in tokens from batch_ramp_from to global_batch, rounded down to a multiple of microbatch.
  """
  if tokens >= train.batch_ramp_tokens:
    return train.global_batch
  rise = (train.global_batch - train.batch_ramp_from) * tokens // train.batch_ramp_tokens
  microbatch = train.microbatch or train.global_batch
  return (train.batch_ramp_from + rise) // microbatch * microbatch


def iterate_batches(
  data: Data, train: TrainConfig, consumed: Consumed, steps: int, load: Callable[[np.ndarray], Any]
) -> Iterator[tuple[Any, Consumed]]:
  """An iterator over the `steps` updates that follow `consumed`, two of them read ahead by a thread.

  Yields (load(window_ids), what is consumed after this update), where `window_ids` int64 [global batch] are windows of
  data.train. `load` runs in that thread: it reads the rows this host needs and puts them on its devices.
  """
  # Samples from the first update on, before each update in the ramp and before the first one after it; from there all
  # updates have one size.
  ramp_starts = [0]
  while len(ramp_starts) <= steps:
    tokens = consumed.tokens + ramp_starts[-1] * data.seq
    if tokens >= train.batch_ramp_tokens:
      break
    ramp_starts.append(ramp_starts[-1] + batch_size(train, tokens))

  def samples_before(step: int) -> int:
    in_ramp = min(step, len(ramp_starts) - 1)
    return ramp_starts[in_ramp] + (step - in_ramp) * train.global_batch

  def batch(step: int) -> tuple[Any, Consumed]:
    start, end = samples_before(step), samples_before(step + 1)
    window_ids = data.window_ids(consumed.samples + start, end - start)
    return load(window_ids), Consumed(consumed.samples + end, consumed.tokens + end * data.seq)

  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
  return iter(grain.MapDataset.range(steps).map(batch).to_iter_dataset(options))


def _print_summary(source: OpenSource, seq: int) -> None:
  index, splits = source.index, source.splits
  documents = f"{sum(index['documents'].values()):,} documents"
  if source.packed.in_pieces:
    documents = (
      f"{_count(index['cut_documents'], 'document')}, too few to hold some out, cut at line or sentence ends into "
      f"{_count(sum(index['documents'].values()), 'piece')}, {index['documents']['heldout']:,} of them held out"
    )
  if null := index.get("null_records"):
    documents += f", {_count(null, 'record')} skipped as null"
  counts = f"{len(splits['train']):,} train and {len(splits['heldout']):,} held-out windows of {seq} tokens"
  action = f"{'reused from' if source.packed.reused else 'packed into'} {source.packed.folder}"
  size = format_bytes(index["text_bytes"])
  current_console().print(f"data: {source.source.name}: {documents}, {size}, {counts}, {action}", err=True)


def _count(number: int, noun: str) -> str:
  return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _check_not_empty(split: str, opened: Sequence[OpenSource], config: DataConfig) -> None:
  """Raises DataError unless `split` has a window in one of the `opened` sources."""
  if any(source.splits[split] for source in opened):
    return
  tokens = sum(source.index["files"][f"{split}.tokens"]["size"] for source in opened) // packed_dataset.DTYPE.itemsize
  text_bytes = sum(source.index["text_bytes"] for source in opened)
  names = ", ".join(source.source.name for source in opened)
  # The size of a split of pieces follows from what a window takes.
  change = "lower" if split == "train" else "raise"
  fraction = f", or {change} data.heldout_fraction (now {config.heldout_fraction})"
  raise DataError(
    f"data.sources: {names}: too little text, {format_bytes(text_bytes)}: its {split} split has {tokens:,} tokens, and "
    f"one window takes {config.seq + 1:,}: add text or lower data.seq"
    + ("" if any(source.packed.in_pieces for source in opened) else fraction)
  )
