"""Pages have one fate at a time, and a prefix is found by its tokens and its weights alone."""

import numpy as np

from deepseek_jax.generate.pages import PagePool


def test_a_prefix_is_shared_as_far_as_it_is_known():
  pool = PagePool(8, 4, "weights")
  text = list(range(14))
  pages, hashes = pool.allocate(3), pool.page_hashes(text)
  assert len(hashes) == 3 and pool.share(hashes) == []
  for page, digest in zip(pages, hashes, strict=True):
    pool.register(page, digest)
  assert pool.share(pool.page_hashes([*text[:8], 99, *text[9:]])) == pages[:2]
  assert pool.share(pool.page_hashes([99, *text[1:]])) == []
  assert pool.share(PagePool(8, 4, "others").page_hashes(text)) == []
  assert pool.page_hashes(text[8:], hashes[1]) == hashes[2:]
  pool.release(pages[:2])
  assert (pool.free, pool.cached) == (5, 0)  # the first still holds all three
  pool.release(pages)
  assert (pool.free, pool.cached, pool.available) == (5, 3, 8)


def test_room_is_made_of_what_was_not_used_longest_and_of_tails_first():
  pool = PagePool(4, 1, "")
  hashes = {name: pool.page_hashes(text) for name, text in (("old", [1, 2]), ("new", [3, 4]))}
  for name in hashes:
    pages = pool.allocate(2)
    for page, digest in zip(pages, hashes[name], strict=True):
      pool.register(page, digest)
    pool.release(pages)
  assert pool.allocate(1) is not None and len(pool.share(hashes["old"])) == 1
  assert pool.allocate(3) is None  # two are held
  assert pool.allocate(2) is not None and pool.share(hashes["new"]) == []


def test_of_two_pages_with_the_same_tokens_the_first_is_known():
  pool = PagePool(2, 2, "")
  (first,), (second,), (digest,) = pool.allocate(1), pool.allocate(1), pool.page_hashes([1, 2])
  pool.register(first, digest)
  pool.register(second, digest)
  pool.release([second])
  pool.release([first])
  assert (pool.free, pool.cached) == (1, 1) and pool.share([digest]) == [first]


def test_random_use_loses_and_doubles_no_page():
  rng, pool, held = np.random.default_rng(0), PagePool(20, 2, ""), []
  for _ in range(3000):
    if held and rng.random() < 0.5:
      pool.release(held.pop(rng.integers(len(held))))
    else:
      text = rng.integers(0, 3, 2 * rng.integers(1, 5)).tolist()
      hashes = pool.page_hashes(text)
      shared = pool.share(hashes)
      own = pool.allocate(len(hashes) - len(shared))
      if own is None:
        pool.release(shared)
        continue
      pages = [*shared, *own]
      for page, digest in zip(pages, hashes, strict=True):
        pool.register(page, digest)
      held.append(pages)
    in_use = {page for pages in held for page in pages}
    assert len(in_use) + pool.free + pool.cached == 20
    assert all(len(set(pages)) == len(pages) for pages in held)
