"""Scores of tokens against logits of the whole sequence, log-softmax in NumPy."""

import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.checkpoint.load import open_saved_model
from deepseek_jax.errors import DataError
from deepseek_jax.evaluate import scoring
from deepseek_jax.evaluate.scoring import Request, Scorer, padded_batch
from deepseek_jax.generate.decoding import padded_length
from tests.saved_models import SEQ, VOCAB, write_hugging_face


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_hugging_face(tmp_path_factory.mktemp("scoring") / "hf")


@pytest.fixture(scope="module")
def log_softmax(folder):
  """A function from token ids [n] to ln p [n, vocab] of the next token, by Model.logits and NumPy."""
  model = deepseek_jax.load_pretrained(folder)

  def log_softmax(tokens):
    padded = np.zeros((1, SEQ), np.int64)  # one shape; what is on the right of a position is not seen
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(model.logits(padded), np.float64)[0, : len(tokens)]
    return (
      logits
      - logits.max(-1, keepdims=True)
      - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    )

  return log_softmax


def make_requests(count, longest=40):
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, longest // 2, (count, 2))
  return [Request(*(rng.integers(0, VOCAB, n).tolist() for n in pair)) for pair in lengths]


def make_scorer(folder, devices=1, batch=4, seq=SEQ):
  saved = open_saved_model(folder)
  return Scorer(saved.load(devices), saved.config.model, seq, batch)


def assert_scores(score, request, log_softmax, seq=SEQ):
  tokens = [*request.context, *request.continuation][-(seq + 1) :]
  expected, targets = log_softmax(tokens[:-1])[-len(request.continuation) :], np.array(request.continuation)
  np.testing.assert_allclose(score.log_probs, expected[np.arange(len(targets)), targets], atol=2e-5)
  np.testing.assert_array_equal(score.is_argmax, expected.argmax(-1) == targets)


def test_scores_are_those_of_the_logits(folder, log_softmax, monkeypatch):
  monkeypatch.setattr(scoring, "CHUNK", 12)
  scoring.score_batch.clear_cache()  # the chunk is a constant of the program
  requests = [Request([5], [7]), *make_requests(3)]
  requests.append(Request([5], [int(log_softmax([5])[-1].argmax())]))
  scores = make_scorer(folder, devices=2).score(requests)
  scoring.score_batch.clear_cache()
  for request, score in zip(requests, scores, strict=True):
    assert_scores(score, request, log_softmax)
  assert scores[-1].is_argmax.all() and not all(score.is_argmax.all() for score in scores)


def test_scores_do_not_depend_on_the_batch(folder):
  requests, done = make_requests(9), []
  scores = make_scorer(folder, batch=4).score(requests, done.append)
  alone = make_scorer(folder, batch=1).score(requests[::-1])[::-1]
  for score, other in zip(scores, alone, strict=True):
    np.testing.assert_allclose(score.log_probs, other.log_probs, atol=2e-5)
  assert done[-1] == 9 and done == sorted(done)


def test_of_what_is_too_long_the_end_is_scored(folder, log_softmax):
  request = Request([3, *make_requests(1)[0].context * 9], [4, 5, 6])
  (score,) = make_scorer(folder, seq=20).score([request])
  assert_scores(score, request, log_softmax, seq=20)


@pytest.mark.parametrize("length", [0, 21])
def test_a_continuation_that_cannot_be_scored_is_refused(folder, length):
  with pytest.raises(DataError, match=f"has {length} tokens, and the model scores 1 to 20"):
    make_scorer(folder, seq=20).score([Request([1], [2] * length)])


def test_few_shapes_are_compiled():
  assert [padded_length(n, 100) for n in (1, 16, 17, 64, 65, 99)] == [16, 16, 32, 64, 100, 100]
  assert [padded_batch(n, 8, 1) for n in (1, 3, 8, 99)] == [1, 4, 8, 8]
  assert padded_batch(3, 8, 3) == 6
