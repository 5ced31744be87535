"""Key-value retrieval by distance: whether a model finds again what its context said, and how far back it can look."""

import random
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.console import current_console
from deepseek_jax.data import key_value_retrieval, sources
from deepseek_jax.errors import ConfigError
from deepseek_jax.evaluate.language_model import LanguageModel
from deepseek_jax.evaluate.results import mean_and_stderr
from deepseek_jax.evaluate.scoring import Request

SAMPLE = 20_000  # characters of filler, from which bytes per token are estimated


class ScoredQuery(NamedTuple):
  """Tokens between a value and where it was set; loss of the value in nats; whether each of its tokens is the likeliest."""

  distance: int
  loss: float
  exact: bool


def evaluate_retrieval(model: LanguageModel, windows: int, seed: int = 0) -> dict[str, dict[str, Any]]:
  """{"FIRST to LAST" tokens of distance: {accuracy, accuracy_stderr, loss, queries}}, in octaves.

  A window is the begin of a document of `key_value_retrieval`, as long as the model takes, which no training has seen: its keys,
  values and the text between are others. All queries of a window are scored in one pass, given the text before them. The accuracy
  is that of values; the loss is of a value, in nats. A value is a digit: a guess has an accuracy of 0.1 and a loss of 2.303.

  Raises ConfigError where no query fits into what the model takes.
  """
  filler = key_value_retrieval.evaluation_filler(sources.read_stdlib())
  scored: list[ScoredQuery] = []
  with current_console().count_progress("evaluate: key-value retrieval", windows) as update:
    for start in range(0, windows, model.batch):
      chosen = range(start, min(start + model.batch, windows))
      scored += _score_windows(model, [random.Random(f"{seed} {i}") for i in chosen], filler)
      update(chosen.stop)
  if not scored:
    raise ConfigError(f"--retrieval: no query fits into {model.seq} tokens: raise --seq, to 128 at least")
  octaves = sorted({query.distance.bit_length() for query in scored})
  results = {}
  for octave in octaves:
    queries = [query for query in scored if query.distance.bit_length() == octave]
    accuracy, stderr = mean_and_stderr([float(query.exact) for query in queries])
    loss, _ = mean_and_stderr([query.loss for query in queries])
    results[f"{1 << octave - 1} to {(1 << octave) - 1}"] = {
      "accuracy": accuracy, "accuracy_stderr": stderr, "loss": loss, "queries": len(queries),
    }  # fmt: skip
  return results


def _score_windows(model: LanguageModel, rngs: list[random.Random], filler: list[str]) -> list[ScoredQuery]:
  """The queries of a window for each of `rngs`."""
  # An eighth more than fits by the estimate, so that documents fill their windows; the rest is cut.
  sample = filler[0][:SAMPLE]
  size = model.seq * len(sample) * 9 // (8 * len(model.tokenizer.encode(sample)))
  documents = [key_value_retrieval.make_document(rng, filler, size, longest=size) for rng in rngs]
  encoded = model.tokenizer.encode_batch([document.text for document in documents])
  scores = model.scorer.score([Request([model.tokenizer.bos], ids[: model.seq].tolist()) for ids, _ in encoded])
  found = []
  for document, (_, byte_counts), score in zip(documents, encoded, scores, strict=True):
    ends = np.cumsum(byte_counts)

    def token_at(position: int, ends: np.ndarray = ends) -> int:
      """The token that has the byte at `position`."""
      return int(np.searchsorted(ends, position, side="right"))

    for query in document.queries:
      first, last = token_at(query.start), token_at(query.end - 1)
      if last < len(score.log_probs):
        distance = first - token_at(query.start - query.distance)
        value = slice(first, last + 1)
        found.append(ScoredQuery(distance, -float(score.log_probs[value].sum()), bool(score.is_argmax[value].all())))
  return found
