"""A model that is asked in text, against its logits of the same tokens."""

import itertools

import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.checkpoint.load import open_saved_model
from deepseek_jax.config_sections import SampleConfig
from deepseek_jax.errors import ConfigError, DataError
from deepseek_jax.evaluate.language_model import LanguageModel, before, rolling_windows
from deepseek_jax.evaluate.scoring import Request
from tests.saved_models import SEQ, TEXT, write_hugging_face

GREEDY = SampleConfig(max_tokens=6, temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_hugging_face(tmp_path_factory.mktemp("language_model") / "hf")


@pytest.fixture(scope="module")
def model(folder):
  saved = open_saved_model(folder)
  return LanguageModel(saved, saved.load_tokenizer(), batch=4)


@pytest.fixture(scope="module")
def plain(folder):
  """A function from ids [n] to ln p [n, vocab] of the id after each, by Model.logits and NumPy."""
  logits_of = deepseek_jax.load_pretrained(folder).logits

  def log_softmax(ids):
    padded = np.zeros((1, SEQ), np.int64)  # one shape; a position does not see what is on its right
    padded[0, : len(ids)] = ids
    logits = np.asarray(logits_of(padded), np.float64)[0, : len(ids)]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

  return log_softmax


def log_prob(plain, ids, count):
  """Sum of ln p of the last `count` of `ids`."""
  return plain(ids[:-1])[np.arange(len(ids) - 1), ids[1:]][-count:].sum()


def test_a_continuation_is_scored_after_its_context(model, plain):
  pairs = [
    ("the words", " of a text"),
    ("the words ", "of a text"),
    ("", "one"),
    (" ", "one"),
    ("a text;", " one by one"),
  ]
  results = model.log_likelihoods(pairs)
  for (context, continuation), result in zip(pairs, results, strict=True):
    ids = [0, *model.tokenizer.encode(context + continuation)]
    count = len(ids) - 1 - len(model.tokenizer.encode(context.rstrip()))
    assert result.num_tokens == count and not result.is_greedy
    assert result.log_prob == pytest.approx(log_prob(plain, ids, count), abs=1e-4)
  assert results[0] == results[1]


def test_contexts_begin_with_bos_as_the_tokenizer_says(folder, model):
  without = LanguageModel(model.saved, model.tokenizer, add_bos=False)
  assert without.encode("the") == model.encode("the")[1:]
  assert without.encode("") == model.encode("") == [0]
  assert without.encode_pair("the", " words").context == model.encode_pair("the", " words").context[1:]
  assert without.encode_pair("", " words") == model.encode_pair("", " words")


def test_a_greedy_continuation_is_noticed(model, plain):
  context = model.encode("the text is")
  likeliest = int(plain(context)[-1].argmax())
  # In ids, since the likeliest may be part of a character.
  scores = model.scorer.score([Request(context, [likeliest]), Request(context, [likeliest ^ 1])])
  assert [bool(score.is_argmax.all()) for score in scores] == [True, False]


def test_what_is_too_long_is_noted(model, plain, capsys):
  (score,) = model.log_likelihoods([(TEXT, " words")])
  assert f"note     1 of 1 are longer than the {SEQ} positions of the model: their beginning" in capsys.readouterr().err
  ids = model.encode(TEXT + " words")[-(SEQ + 1) :]
  assert score.log_prob == pytest.approx(log_prob(plain, ids, score.num_tokens), abs=1e-4)
  model.log_likelihoods([("the", " words")])
  assert "note" not in capsys.readouterr().err
  with pytest.raises(DataError, match="a continuation has .* tokens, and the model scores 1 to 48"):
    model.log_likelihoods([("the", TEXT)])


@pytest.mark.parametrize("stride", [None, 16])
def test_every_token_of_a_document_is_scored_once(model, plain, stride):
  texts = ["the words are few", TEXT[:300], ""]
  results = model.document_log_likelihoods(texts, stride)
  for text, result in zip(texts, results, strict=True):
    ids = model.tokenizer.encode(text)
    assert result.num_tokens == len(ids)
    total, scored = 0.0, 0
    while scored < len(ids):  # the definition, with whole sequences
      end = min(len(ids), scored + ((stride or SEQ) if scored else SEQ))
      window = [0, *ids][max(0, end - SEQ) : end + 1]
      total += log_prob(plain, window, end - scored)
      scored = end
    assert result.log_prob == pytest.approx(total, abs=1e-3)


def test_a_stride_is_at_most_a_window(model):
  with pytest.raises(ConfigError, match=f"stride={SEQ + 1} is longer than the {SEQ} positions"):
    model.document_log_likelihoods(["a"], SEQ + 1)


def test_windows_are_those_of_the_definition():
  ids = list(range(10, 21))
  windows = rolling_windows(ids, bos=0, seq=4, stride=4)
  assert [w.continuation for w in windows] == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19, 20]]
  assert [w.context for w in windows] == [[0], [13], [16, 17]]
  for seq, stride in itertools.product((1, 3, 4, 20), (1, 2, 3)):
    windows = rolling_windows(ids, 0, seq, min(stride, seq))
    assert [i for w in windows for i in w.continuation] == ids
    stream = [0, *ids]
    for window in windows:
      whole = [*window.context, *window.continuation]
      end = stream.index(window.continuation[-1]) + 1
      assert whole == stream[max(0, end - seq - 1) : end] and window.context
  assert rolling_windows([], 0, 4, 4) == []


def test_generation_is_the_likeliest_token_again_and_again(model, plain):
  prompts = ["the words", "one", "the model sees the words of a text"]
  texts = model.generate(prompts, GREEDY)
  for prompt, text in zip(prompts, texts, strict=True):
    ids = model.encode(prompt)
    start = len(ids)
    for _ in range(GREEDY.max_tokens):
      token = int(plain(ids)[-1].argmax())
      if token == model.tokenizer.eos:
        break
      ids.append(token)
    assert text == model.tokenizer.decode(ids[start:])


def test_generation_stops_before_the_first_stop(model):
  (text,) = model.generate(["the words"], GREEDY)
  assert len(text) > 3
  assert model.generate(["the words"], GREEDY, stop=["never", text[2:]]) == [before(text, [text[2:]])]
  assert before("a\nb;c", [";", "\n"]) == "a" and before("abc", []) == "abc"


def test_a_prompt_that_is_too_long_loses_its_beginning(model, plain, capsys):
  (text,) = model.generate([TEXT], GREEDY)
  assert "1 of 1 are longer than" in capsys.readouterr().err
  ids = model.encode(TEXT)[-(SEQ - GREEDY.max_tokens) :]
  assert text.startswith(model.tokenizer.decode([int(plain(ids)[-1].argmax())]).rstrip("\ufffd"))
  with pytest.raises(ConfigError, match="max_tokens=48 of 48 positions leave no room for a prompt: lower it below 48"):
    model.generate(["a"], SampleConfig(max_tokens=SEQ))
