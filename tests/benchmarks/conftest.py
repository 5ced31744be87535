"""What the tests of the benchmarks share: some text to read."""

import random

import pytest


@pytest.fixture
def text(tmp_path):
  """A folder of forty small text files."""
  rng = random.Random(0)
  (tmp_path / "text").mkdir()
  for i in range(40):
    words = " ".join(rng.choice(["def", "return", "x", "y", "+", "="]) for _ in range(200))
    (tmp_path / "text" / f"{i}.txt").write_text(f"{i} {words}")
  return tmp_path / "text"
