"""Which sequences run, and what they compute next: continuous batching (Yu et al. 2022). Nothing here needs jax.

A sequence waits, gets a slot and pages, computes its prompt in chunks, and then a token or two in every step. Where pages
run out, the youngest sequence gives its own back, waits again, and is later computed again, with its answer so far.
All choices follow from what was asked for and in which order, so that the processes of a mesh choose alike.
"""

import collections
import dataclasses
from collections.abc import Iterator

from deepseek_jax.generate.pages import PagePool
from deepseek_jax.generate.request import Request, TokenLogprobs


@dataclasses.dataclass(eq=False)
class Sequence:
  """A request on its way.

  Attributes:
    request: as it was added.
    tokens: of prompt and answer so far.
    shard, slot: where it runs; slots count within their shard. -1 while it waits.
    pages: of its shard, for the positions of `tokens` in order.
    hashes: of the pages that are full.
    computed: how many of `tokens` are in the cache.
    is_prefilled: whether its prompt is cached, and it decodes.
    draft: of the token after `tokens`; None: there is none.
    cached_tokens: of the prompt, that the prefix cache had.
    prompt_logprobs: so far; empty once they are given.
    has_answered: whether an output was given.
  """

  request: Request
  tokens: list[int]
  shard: int = -1
  slot: int = -1
  pages: list[int] = dataclasses.field(default_factory=list)
  hashes: list[bytes] = dataclasses.field(default_factory=list)
  computed: int = 0
  is_prefilled: bool = False
  draft: int | None = None
  cached_tokens: int = 0
  prompt_logprobs: list[TokenLogprobs | None] = dataclasses.field(default_factory=list)
  has_answered: bool = False

  @property
  def generated(self) -> int:
    """Tokens of the answer so far."""
    return len(self.tokens) - len(self.request.prompt)

  @property
  def wants_prompt_logprobs(self) -> bool:
    """Whether log-probabilities of the prompt are still to be given: they come with the first output."""
    return self.request.sampling.prompt_logprobs is not None and not self.has_answered


class Scheduler:
  """Slots, pages and the queue.

  Args:
    slots: of each shard of the batch.
    pools: of each shard.
    chunk: prompts are cut at multiples of this many tokens.
    is_static: static batching: new sequences start when all others have finished.
  """

  def __init__(self, slots: int, pools: list[PagePool], chunk: int, is_static: bool = False):
    self.pools, self.chunk, self.is_static = pools, chunk, is_static
    self.waiting: collections.deque[Sequence] = collections.deque()
    self.slots: list[list[Sequence | None]] = [[None] * slots for _ in pools]
    self.running: list[Sequence] = []  # the youngest last
    self._by_id: dict[int, Sequence] = {}  # those that have not ended
    self.preemptions = 0

  def add(self, request: Request) -> None:
    """Puts `request` at the end of the queue."""
    sequence = self._by_id[request.id] = Sequence(request, list(request.prompt))
    self.waiting.append(sequence)

  def find(self, id: int) -> Sequence | None:
    """The sequence of the request `id`, unless it has ended."""
    return self._by_id.get(id)

  def remove(self, sequence: Sequence) -> None:
    """Frees the slot and the pages of `sequence`, or takes it out of the queue."""
    del self._by_id[sequence.request.id]
    if sequence.slot < 0:
      self.waiting.remove(sequence)
    else:
      self._stop(sequence)

  def may_admit(self) -> bool:
    """Whether sequences may get free slots."""
    return not self.is_static or not any(s.is_prefilled for s in self.running)

  def next_chunks(self, may_admit: bool = True) -> list[Sequence | None]:
    """The sequence of each shard whose prompt is to be computed next, the oldest; None: there is none.

    may_admit: whether one that waits may get a slot for this. It stays at the head of the queue until there is room.
    """
    chosen: list[Sequence | None] = [None] * len(self.pools)
    for sequence in self.running:
      if not sequence.is_prefilled and chosen[sequence.shard] is None:
        chosen[sequence.shard] = sequence
    # The emptiest shard first.
    for shard in sorted(range(len(self.pools)), key=lambda i: -self.slots[i].count(None)):
      if may_admit and chosen[shard] is None and self.waiting and self._admit(self.waiting[0], shard):
        chosen[shard] = self.waiting.popleft()
    return chosen

  def chunk_end(self, sequence: Sequence) -> int:
    """Where the chunk ends that begins at `sequence.computed`."""
    return min(len(sequence.request.prompt), (sequence.computed // self.chunk + 1) * self.chunk)

  def decoding(self) -> Iterator[Sequence]:
    """The sequences that decode, the oldest first, each with pages for its newest token and its draft.

    For its newest token younger ones may lose their pages. A draft for which there is no page is dropped.
    """
    for sequence in [s for s in self.running if s.is_prefilled]:
      if sequence.slot >= 0 and self._grow(sequence, len(sequence.tokens)):
        pool = self.pools[sequence.shard]
        if sequence.draft is not None and len(sequence.pages) * pool.page_size <= len(sequence.tokens):
          page = pool.allocate(1)
          sequence.pages += page or []
          sequence.draft = sequence.draft if page else None
        yield sequence

  def advance(self, sequence: Sequence, computed: int) -> None:
    """Notes that the first `computed` of the tokens are cached, and which pages are full with that."""
    sequence.computed = computed
    pool = self.pools[sequence.shard]
    first, full = len(sequence.hashes), computed // pool.page_size
    if full > first:
      parent = sequence.hashes[-1] if sequence.hashes else None
      new = pool.page_hashes(sequence.tokens[first * pool.page_size : full * pool.page_size], parent)
      for page, digest in zip(sequence.pages[first:full], new, strict=True):
        pool.register(page, digest)
      sequence.hashes += new

  def _admit(self, sequence: Sequence, shard: int) -> bool:
    """Gives `sequence` a slot of `shard`, and pages for its tokens and one more, if the shard has both."""
    if None not in self.slots[shard]:
      return False
    pool = self.pools[shard]
    hashes: list[bytes] = []
    if not sequence.wants_prompt_logprobs:  # else every token is to be computed
      hashes = pool.page_hashes(sequence.request.prompt[:-1])  # its last token is computed, for what it predicts
    shared = pool.share(hashes)
    own = pool.allocate(-(-(len(sequence.tokens) + 1) // pool.page_size) - len(shared))
    if own is None:
      pool.release(shared)
      return False
    sequence.shard, sequence.slot = shard, self.slots[shard].index(None)
    sequence.pages, sequence.hashes = [*shared, *own], hashes[: len(shared)]
    sequence.computed = len(shared) * pool.page_size
    if not sequence.has_answered:
      sequence.cached_tokens = sequence.computed
    self.slots[shard][sequence.slot] = sequence
    self.running.append(sequence)
    return True

  def _grow(self, sequence: Sequence, length: int) -> bool:
    """Gives `sequence` pages for `length` positions; False: it was itself the youngest, and waits now."""
    pool = self.pools[sequence.shard]
    while len(sequence.pages) * pool.page_size < length:
      page = pool.allocate(1)
      if page is not None:
        sequence.pages += page
        continue
      youngest = next(s for s in reversed(self.running) if s.shard == sequence.shard)
      self._stop(youngest)
      self.waiting.appendleft(youngest)
      self.preemptions += 1
      if youngest is sequence:
        return False
    return True

  def _stop(self, sequence: Sequence) -> None:
    """Frees the slot and the pages of a sequence that runs."""
    self.pools[sequence.shard].release(sequence.pages)
    self.slots[sequence.shard][sequence.slot] = None
    self.running.remove(sequence)
    sequence.shard = sequence.slot = -1
    sequence.draft = None
    sequence.pages, sequence.hashes, sequence.computed, sequence.is_prefilled = [], [], 0, False
    sequence.prompt_logprobs = []
