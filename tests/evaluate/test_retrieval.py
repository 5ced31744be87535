"""Key-value retrieval by distance, of models whose memory is known."""

import re
import types

import numpy as np
import pytest

from deepseek_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from deepseek_jax.errors import ConfigError
from deepseek_jax.evaluate.retrieval import evaluate_retrieval
from deepseek_jax.evaluate.scoring import TokenScores
from tests.saved_models import write_tokenizer

MEMORY = 64  # tokens


class Copier:
  """Stands for a model: it knows a value exactly if it was set at most MEMORY tokens before."""

  def __init__(self, tokenizer):
    self.tokenizer = tokenizer

  def score(self, requests):
    return [self.scores(np.array(request.continuation)) for request in requests]

  def scores(self, ids):
    tokens = [self.tokenizer.decode([i]) for i in ids]
    begins = np.cumsum([0, *map(len, tokens)])
    text, known = "".join(tokens), np.zeros(len(ids), bool)
    for match in re.finditer(r"get ([A-Z]\d)", text):
      set_at = text.rfind(f"set {match[1]}", 0, match.start())
      if set_at >= 0:
        begin, value = (int(np.searchsorted(begins, at + len("set Q"), "right")) - 1 for at in (set_at, match.start()))
        known[value] = value - begin <= MEMORY
    return TokenScores(np.where(known, 0.0, -1.0), known)


@pytest.fixture(params=["byte", "bpe"])
def tokenizer(request, tmp_path):
  if request.param == "byte":
    return ByteTokenizer()
  write_tokenizer(tmp_path, add_bos=True)
  return load_tokenizer(str(tmp_path / "tokenizer.json"))


def model(tokenizer, seq):
  return types.SimpleNamespace(tokenizer=tokenizer, seq=seq, batch=4, scorer=Copier(tokenizer))


def test_a_model_that_remembers_so_far_finds_what_is_nearer(tokenizer):
  results = evaluate_retrieval(model(tokenizer, 512), 12)
  assert list(results) == ["16 to 31", "32 to 63", "64 to 127", "128 to 255", "256 to 511"]
  *near, at, beyond, farthest = results.values()
  assert all(row["accuracy"] == 1 and row["loss"] == 0 and row["accuracy_stderr"] == 0 for row in near)
  assert at["accuracy"] < 0.2  # of those at MEMORY itself
  assert all(row["accuracy"] == 0 and row["loss"] == 1 for row in (beyond, farthest))
  assert all(row["queries"] > 5 for row in results.values())


def test_windows_depend_on_the_seed_alone():
  first, again, other = (
    evaluate_retrieval(model(ByteTokenizer(), 256), count, seed) for count, seed in ((5, 0), (5, 0), (5, 1))
  )
  assert first == again != other
  total = sum(row["queries"] for row in first.values())
  assert total < sum(row["queries"] for row in evaluate_retrieval(model(ByteTokenizer(), 256), 6).values())


def test_too_short_a_window_is_refused():
  with pytest.raises(ConfigError, match="no query fits into 16 tokens: raise --seq"):
    evaluate_retrieval(model(ByteTokenizer(), 16), 2)


def test_documents_fill_their_windows(tokenizer):
  sizes = []

  class Recorder(Copier):
    def score(self, requests):
      sizes.extend(len(request.continuation) for request in requests)
      return super().score(requests)

  evaluate_retrieval(types.SimpleNamespace(tokenizer=tokenizer, seq=512, batch=4, scorer=Recorder(tokenizer)), 4)
  assert sizes == [512] * 4  # cut to what the model takes
