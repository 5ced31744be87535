"""Key-value retrieval: documents with lines `set KEYVALUE`, and later `get KEYVALUE`, between lines of other text.

A key is a letter and a value a digit: `set Q7`. What follows `get Q` is known only from the line that set Q last, up to LONGEST
bytes before. Ordinary text has little that depends on what is so far back: with a few per cent of these documents a model learns
to use a long context, and how well it does so can be measured by distance.

The text between, here called filler, is the interpreter's own library. Documents to train on have files that
data.heldout_fraction never holds out, up to one half. Documents to evaluate on have those that it holds out first.
"""

import hashlib
import heapq
import itertools
import json
import math
import pathlib
import random
import string
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from deepseek_jax.data import cache
from deepseek_jax.data.splitting import text_hash
from deepseek_jax.errors import DataError

NAME = "key-value-retrieval"  # in data.sources
VERSION = 1  # raised when other documents are made of the same filler
DOCUMENTS, DOCUMENT_BYTES = 256, 8192  # 2 MiB: as 5% of the samples they last for 40 MiB of text
SHORTEST, LONGEST = 16, 2048  # bytes from where a value is set to where it is asked for
KEYS, VALUES = string.ascii_uppercase, string.digits
SET_EVERY = 21  # bytes of text a line that sets a key, if a key is free: in LONGEST bytes each is used a few times
EVALUATION_BYTES = 200_000  # of filler to evaluate on: the library has it in 3% of its text


class Query(NamedTuple):
  """A value that a document asks for: [start, end) in its text, and how far before `start` it was set. All in bytes."""

  start: int
  end: int
  distance: int


class RetrievalDocument(NamedTuple):
  """A document of ASCII characters, and its queries in the order of the text."""

  text: str
  queries: tuple[Query, ...]


def make_document(
  rng: random.Random, filler: Sequence[str], size: int = DOCUMENT_BYTES, longest: int = LONGEST
) -> RetrievalDocument:
  """A document of `size` bytes or a few lines more. Distances are log-uniform between SHORTEST and `longest`.

  filler: texts of ASCII characters. A query that would be beyond the end is left out. A key is set again only after it was asked
  for.
  """
  free, lines = rng.sample(KEYS, len(KEYS)), _random_lines(rng, filler)
  text, queries, num_set = "", [], 0
  due: list[tuple[int, int, str]] = []  # a heap of (where to ask, where the value was set, key and value)
  while len(text) < size:
    while due and due[0][0] <= len(text):
      _, set_at, pair = heapq.heappop(due)
      text += f"get {pair}\n"
      start, end = len(text) - 2, len(text) - 1
      queries.append(Query(start, end, start - set_at))
      free.insert(0, pair[0])
    if free and num_set * SET_EVERY <= len(text):
      pair, num_set = free.pop() + rng.choice(VALUES), num_set + 1
      text += f"set {pair}\n"
      set_at = len(text) - 2
      distance = math.exp(rng.uniform(math.log(SHORTEST), math.log(longest)))
      heapq.heappush(due, (set_at + int(distance) - len("get Q"), set_at, pair))
    else:
      text += next(lines)
  return RetrievalDocument(text, tuple(queries))


def _random_lines(rng: random.Random, filler: Sequence[str]) -> Iterator[str]:
  """Yields the lines of one of `filler` from a random one on, then those of another, without end."""
  while True:
    lines = rng.choice(filler).splitlines(keepends=True)
    yield from lines[rng.randrange(len(lines)) :]


def training_filler(texts: Iterable[str]) -> list[str]:
  """Those of `texts` to train on: ASCII, and in the half of all documents that is held out last."""
  return _checked([text for text in texts if _is_filler(text) and text_hash(text)[-1] >= 128])


def evaluation_filler(texts: Iterable[str]) -> list[str]:
  """Those of `texts` to evaluate on: ASCII, about EVALUATION_BYTES of the documents that are held out first."""
  by_hash = sorted(filter(_is_filler, texts), key=lambda text: text_hash(text)[::-1])
  sizes = itertools.accumulate(map(len, by_hash), initial=0)
  return _checked([text for text, before in zip(by_hash, sizes, strict=False) if before < EVALUATION_BYTES])


def _is_filler(text: str) -> bool:
  return text.isascii() and text.endswith("\n")


def _checked(filler: list[str]) -> list[str]:
  if not filler:
    raise DataError(
      f"{NAME} needs the interpreter's library as text between its lines, and there are no .py files: install it"
    )
  return filler


def write_documents(texts: Iterable[str], folder: pathlib.Path) -> list[pathlib.Path]:
  """Paths of the documents to train on, made of `texts`: a subfolder of `folder`, made once.

  The same texts give the same documents. Raises DataError where they cannot be written.
  """
  filler = training_filler(texts)
  digest = hashlib.sha256(json.dumps([VERSION, filler]).encode()).hexdigest()[:16]
  target = folder / f"{NAME}-{digest}"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with cache.exclusive_lock(folder / f"{target.name}.lock", f"makes {NAME}") as locked:
      if not target.is_dir():
        rng = random.Random(0)
        with cache.temporary_folder(target, remove_stale=locked) as temporary:
          for i in range(DOCUMENTS):
            (temporary / f"{i:03}.txt").write_text(make_document(rng, filler).text)
          cache.rename_unless_exists(temporary, target)
  except OSError as error:
    raise DataError(
      f"cannot write {NAME} under {folder}: {error.strerror or error}. Make room, or set data.cache to another folder"
    ) from None
  return sorted(target.iterdir())
