import random

import pytest

from deepseek_jax.data.splitting import MAX_PIECE, MIN_PIECE, plan_split, split_text

WORDS = ["abc", "naïve", "日本", "de", "fghij"]


def text_of(separators, characters, seed=0):
  """Random words between random ones of `separators`."""
  rng = random.Random(seed)
  text = ""
  while len(text) < characters:
    text += rng.choice(WORDS) + rng.choice(separators)
  return text


@pytest.mark.parametrize(
  ("separators", "ends"),
  [
    (["\n\n"] + 5 * ["\n", ". ", " "], "\n\n"),
    (["\r\n\r\n"] + 5 * ["\r\n", " "], "\r\n\r\n"),
    (["\n"] + 5 * [". ", " "], "\n"),
    ([". "] + 5 * [" "], ". "),
    (["。"] + 5 * [""], "。"),
    ([" "], " "),
    ([""], ""),
  ],
)
@pytest.mark.parametrize("size", [2000, 5000])
def test_pieces_are_the_text_and_end_at_the_best_boundary(separators, ends, size):
  text = text_of(separators, 80_000)
  *pieces, last = split_text(text, size)
  assert "".join([*pieces, last]) == text
  assert all(size // 2 <= len(piece) <= size + len(ends) for piece in pieces) and len(last) <= size * 3 // 2
  assert all(piece.endswith(ends) for piece in pieces) and len(pieces) > 10


def test_a_short_text_is_one_piece():
  assert list(split_text("a b " * 20, 60)) == ["a b " * 20]
  assert list(split_text("", 60)) == [""]


@pytest.mark.parametrize(
  ("characters", "fraction", "minimum", "share"),
  [(200_000, 0.02, 100, 0.02), (200_000, 0.2, 100, 0.2), (20_000, 0.01, 1000, 0.05), (3000, 0.02, 2000, 0.5)],
)
def test_the_share_that_is_held_out(characters, fraction, minimum, share):
  texts = [text_of(["\n", " "], characters // 2, seed) for seed in (0, 1)]
  split = plan_split(lambda: texts, fraction, minimum)
  assert split.num_documents == 2 and MIN_PIECE <= split.piece_characters <= MAX_PIECE
  pieces = [piece for text in texts for piece in split_text(text, split.piece_characters)]
  heldout = sum(len(piece) for piece in pieces if split.is_heldout(piece))
  total = sum(map(len, texts))
  assert share * total <= heldout <= share * total + 1.5 * split.piece_characters
  assert split == plan_split(lambda: texts, fraction, minimum)


def test_copies_are_in_the_same_split():
  """Two copies of a text whose pieces end alike: what is held out of one is held out of the other."""
  text = text_of(["\n"], 20_000)
  split = plan_split(lambda: [text, text], 0.1, 0)
  pieces = list(split_text(text, split.piece_characters))
  heldout = sum(len(piece) for piece in pieces if split.is_heldout(piece))
  assert 0.1 * len(text) <= heldout <= 0.1 * len(text) + split.piece_characters
