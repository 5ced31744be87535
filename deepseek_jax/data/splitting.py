"""Pieces of documents, for a source with too few documents to hold some of them out.

Texts are cut at boundaries. Each piece is then a document of its own, between separators.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

# Piece ends, the best first: a blank line, a line, a sentence, a word.
BOUNDARIES = ("\n\n", "\r\n\r\n", "\n", ". ", "。", " ")
MIN_PIECE, MAX_PIECE = 256, 1 << 16  # characters
PIECES_HELD_OUT = 16  # at least about as many, so that they come from several places of the text


class Split(NamedTuple):
  """How documents are cut, and which pieces are held out, by the hash of their text."""

  piece_characters: int
  heldout: frozenset[bytes]
  num_documents: int

  def is_heldout(self, piece: str) -> bool:
    """Whether a piece is in the held-out split. Copies of a piece are in the same split."""
    return text_hash(piece) in self.heldout


def plan_split(read_texts: Callable[[], Iterable[str]], fraction: float, min_characters: int) -> Split:
  """The Split of the texts that `read_texts()` yields, which is called twice: they need not fit in memory together.

  Pieces are held out in the order of their hashes, until they have `fraction` of the characters, or `min_characters` if
  that is more, but at most half of them.
  """
  num_documents = characters = 0
  for text in read_texts():
    num_documents, characters = num_documents + 1, characters + len(text)
  target = min(max(fraction * characters, min_characters), characters / 2)
  size = int(min(max(target / PIECES_HELD_OUT, MIN_PIECE), MAX_PIECE))
  sizes: dict[bytes, int] = {}  # of all copies of a piece
  for text in read_texts():
    for piece in split_text(text, size):
      digest = text_hash(piece)
      sizes[digest] = sizes.get(digest, 0) + len(piece)
  heldout, total = set(), 0
  for digest in sorted(sizes):
    if total >= target:
      break
    heldout.add(digest)
    total += sizes[digest]
  return Split(size, frozenset(heldout), num_documents)


def split_text(text: str, size: int) -> Iterator[str]:
  """Yields `text` in pieces of size / 2 to size characters, the last up to 3 / 2 size: joined they are `text`.

  A piece ends after the last of the best boundary in its second half, and anywhere only where there is none.
  """
  start = 0
  while len(text) - start > size * 3 // 2:
    low, high = start + size // 2, start + size
    ends = ((text.rfind(boundary, low, high), len(boundary)) for boundary in BOUNDARIES)
    end = next((at + length for at, length in ends if at >= 0), high)
    yield text[start:end]
    start = end
  yield text[start:]


def text_hash(text: str) -> bytes:
  """A hash of 8 bytes."""
  return hashlib.blake2b(text.encode(), digest_size=8).digest()
