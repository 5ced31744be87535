"""Who runs, who waits and who gives way, without a model."""

import numpy as np
import pytest

from deepseek_jax.generate.pages import PagePool
from deepseek_jax.generate.request import Request, Sampling
from deepseek_jax.generate.scheduler import Scheduler


def make(slots=2, pages=8, shards=1, **options):
  return Scheduler(slots, [PagePool(pages, 4, "") for _ in range(shards)], chunk=8, **options)


def add(scheduler, *lengths, first=0):
  for i, length in enumerate(lengths, first):
    scheduler.add(Request(i, tuple(range(100 * i, 100 * i + length)), Sampling(max_tokens=99)))


def compute(scheduler, may_admit=True):
  """Computes a chunk on each shard; ids of the requests whose chunks they were."""
  chunks = scheduler.next_chunks(may_admit)
  for sequence in filter(None, chunks):
    scheduler.advance(sequence, scheduler.chunk_end(sequence))
    if sequence.computed == len(sequence.tokens):
      sequence.is_prefilled = True
      sequence.tokens.append(7)
  return [s.request.id if s else None for s in chunks]


def decode(scheduler):
  """A token of each sequence that decodes; their ids."""
  sequences = list(scheduler.decoding())
  for sequence in sequences:
    scheduler.advance(sequence, len(sequence.tokens))
    sequence.tokens.append(7)
  return [s.request.id for s in sequences]


def test_prompts_are_computed_one_after_the_other_in_chunks_at_fixed_positions():
  scheduler = make()
  add(scheduler, 13, 3, 5)
  assert [compute(scheduler) for _ in range(4)] == [[0], [0], [1], [None]]
  assert [s.request.id for s in scheduler.waiting] == [2]  # two slots
  scheduler.remove(scheduler.find(0))
  assert compute(scheduler) == [2] and decode(scheduler) == [1, 2]


def test_the_tail_after_a_shared_prefix_ends_where_chunks_end():
  scheduler = make(slots=1, pages=20)
  add(scheduler, 30)
  while compute(scheduler) != [None]:
    pass
  scheduler.remove(scheduler.find(0))
  scheduler.add(Request(1, (*range(14), 99, *range(15, 30)), Sampling(max_tokens=1)))
  (sequence,) = scheduler.next_chunks()
  assert (sequence.computed, sequence.cached_tokens, scheduler.chunk_end(sequence)) == (12, 12, 16)


def test_the_head_of_the_queue_waits_for_pages_and_nobody_passes_it():
  scheduler = make(slots=3, pages=5)
  add(scheduler, 11, 10, 2)
  assert [compute(scheduler) for _ in range(3)] == [[0], [0], [None]]
  assert [s.request.id for s in scheduler.waiting] == [1, 2]


def test_shards_have_slots_and_pages_of_their_own():
  scheduler = make(slots=1, pages=4, shards=2)
  add(scheduler, 3, 4, 5)
  assert compute(scheduler) == [0, 1] and compute(scheduler) == [None, None]
  assert decode(scheduler) == [0, 1] and {s.shard for s in scheduler.running} == {0, 1}


def test_the_youngest_of_the_shard_gives_its_pages():
  scheduler = make(slots=3, pages=5)
  add(scheduler, 3, 4, 2)
  for _ in range(3):
    compute(scheduler)
  assert [decode(scheduler) for _ in range(3)] == [[0, 1, 2], [0, 1, 2], [0, 1]]
  assert scheduler.preemptions == 1 and scheduler.waiting[0].request.id == 2
  waiting = scheduler.waiting[0]
  assert (waiting.computed, waiting.pages, waiting.is_prefilled, waiting.generated) == (0, [], False, 3)
  scheduler.remove(scheduler.find(0))
  assert compute(scheduler) == [2]


def test_a_draft_takes_no_page_from_others_and_is_dropped_without_one():
  scheduler = make(slots=2, pages=4)
  add(scheduler, 7, 6)
  for _ in range(2):
    compute(scheduler)
  scheduler.running[0].draft = scheduler.running[1].draft = 9
  assert decode(scheduler) == [0, 1] and scheduler.preemptions == 0
  # The first has 8 tokens in two pages, and no page is free; the second has room for its draft.
  assert [s.draft for s in scheduler.running] == [None, 9]


def test_static_batching_admits_when_all_are_done():
  scheduler = make(is_static=True)
  add(scheduler, 3, 3, 3)
  assert scheduler.may_admit() and [compute(scheduler, True) for _ in range(3)] == [[0], [1], [None]]
  scheduler.remove(scheduler.find(0))
  assert not scheduler.may_admit() and compute(scheduler, scheduler.may_admit()) == [None]
  scheduler.remove(scheduler.find(1))
  assert scheduler.may_admit() and compute(scheduler, True) == [2]


@pytest.mark.parametrize("seed", range(5))
def test_whatever_comes_all_end_and_nothing_is_lost(seed):
  rng = np.random.default_rng(seed)
  scheduler = make(slots=3, pages=12, shards=2)
  most, done, added = {}, set(), 0
  for _ in range(3000):
    if added < 60 and rng.random() < 0.2:
      add(scheduler, int(rng.integers(1, 20)), first=added)
      most[added] = int(rng.integers(1, 25))
      added += 1
    compute(scheduler)
    decode(scheduler)
    for sequence in [*scheduler.running]:
      if sequence.generated >= most[sequence.request.id] or rng.random() < 0.01:
        scheduler.remove(sequence)
        done.add(sequence.request.id)
    held = sum(len(set(s.pages)) for s in scheduler.running)
    assert held <= 24 and all(s.slot >= 0 for s in scheduler.running)
  assert done == set(range(60)) and not scheduler.running and not scheduler.waiting
  assert all(pool.available == 12 for pool in scheduler.pools) and scheduler.preemptions > 0
