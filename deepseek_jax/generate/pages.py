"""Which page of the key-value cache belongs to whom, and which pages a new prompt can share. Nothing here needs jax.

A page that is full is known by the hash of its tokens and of all tokens before them. When nobody holds it any more it
stays, until its room is needed: the prefix cache.
"""

import collections
import hashlib
from collections.abc import Sequence

import numpy as np


class PagePool:
  """The pages of one shard of the batch, with a reference count each.

  Args:
    pages: their number.
    page_size: tokens of a page.
    weights: names the weights that fill the pages, so that others never find them.
  """

  def __init__(self, pages: int, page_size: int, weights: str):
    self.page_size = page_size
    self._root = hashlib.sha256(weights.encode()).digest()
    self._free = list(range(pages - 1, -1, -1))  # the next one last
    self._ref_counts = [0] * pages
    self._hash_of: dict[int, bytes] = {}
    self._page_of: dict[bytes, int] = {}
    self._evictable: collections.OrderedDict[int, None] = collections.OrderedDict()  # with a hash; the oldest first

  @property
  def free(self) -> int:
    """Pages that hold nothing."""
    return len(self._free)

  @property
  def cached(self) -> int:
    """Pages that nobody holds, which a prompt may share."""
    return len(self._evictable)

  @property
  def available(self) -> int:
    """Pages that `allocate` can give."""
    return self.free + self.cached

  def page_hashes(self, tokens: Sequence[int], parent: bytes | None = None) -> list[bytes]:
    """The hash of each full page of `tokens`. parent: of the page before them; None: they begin the sequence."""
    digest, hashes = parent or self._root, []
    ids = np.asarray(tokens, np.int32)
    for start in range(0, len(ids) - self.page_size + 1, self.page_size):
      digest = hashlib.sha256(digest + ids[start : start + self.page_size].tobytes()).digest()
      hashes.append(digest)
    return hashes

  def share(self, hashes: Sequence[bytes]) -> list[int]:
    """Pages of the longest prefix of `hashes` that is here, which the caller holds from now on."""
    pages = []
    for digest in hashes:
      page = self._page_of.get(digest)
      if page is None:
        break
      self._evictable.pop(page, None)
      self._ref_counts[page] += 1
      pages.append(page)
    return pages

  def allocate(self, count: int) -> list[int] | None:
    """`count` pages of the caller's own; None where there are fewer. The prefix cache gives what was not used longest."""
    if count > self.available:
      return None
    while len(self._free) < count:
      page, _ = self._evictable.popitem(last=False)
      del self._page_of[self._hash_of.pop(page)]
      self._free.append(page)
    pages = [self._free.pop() for _ in range(count)]
    for page in pages:
      self._ref_counts[page] = 1
    return pages

  def register(self, page: int, digest: bytes) -> None:
    """Notes that `page`, which the caller holds, is full and has this hash; another page that has it stays the known one."""
    if digest not in self._page_of and page not in self._hash_of:
      self._page_of[digest], self._hash_of[page] = page, digest

  def release(self, pages: Sequence[int]) -> None:
    """Gives `pages` back, in the order of the sequence. Its last page goes first when room is needed."""
    for page in reversed(pages):
      self._ref_counts[page] -= 1
      assert self._ref_counts[page] >= 0
      if self._ref_counts[page]:
        continue
      if page in self._hash_of:
        self._evictable[page] = None
      else:
        self._free.append(page)
