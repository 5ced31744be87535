"""Accuracies from log-likelihoods that a test decides."""

import numpy as np
import pytest

from deepseek_jax.errors import CheckpointError
from deepseek_jax.evaluate.language_model import LogLikelihood
from deepseek_jax.evaluate.multiple_choice import Question, evaluate_multiple_choice


class Model:
  """Finds a continuation as likely as `log_probs` says."""

  def __init__(self, log_probs):
    self.log_probs = log_probs

  def log_likelihoods(self, pairs, name):
    self.pairs = pairs
    return [LogLikelihood(self.log_probs[continuation.strip()], False, 1) for _, continuation in pairs]


def test_accuracy_by_sum_by_character_and_by_byte():
  # Of "b": -3 in all, -3 a character; of "long one" -8, -1; of "ééé": -4.5 in all, -1.5 a character, -0.75 a byte.
  model = Model({"b": -3.0, "long one": -8.0, "ééé": -4.5, "other": -100.0})
  questions = [
    Question("q", ["b", "long one", "ééé"], answer) for answer in (0, 1, 2)
  ] + [Question("r", ["other", "b"], 1)]  # fmt: skip
  result = evaluate_multiple_choice(model, questions)
  assert model.pairs[0] == ("q", " b") and len(model.pairs) == 11
  assert (result["acc"], result["acc_norm"], result["acc_bytes"]) == (0.5, 0.5, 0.5)
  for index, metric in enumerate(("acc", "acc_norm", "acc_bytes")):  # each takes another one of the first three
    (only,) = [evaluate_multiple_choice(model, [questions[i]])[metric] for i in [index]]
    assert only == 1.0
  assert result["acc_stderr"] == pytest.approx(np.std([1, 0, 0, 1], ddof=1) / 2)
  assert result["questions"] == 4


def test_the_delimiter_and_ties():
  model = Model({"a": -1.0, "b": -1.0})
  result = evaluate_multiple_choice(model, [Question("q", ["a", "b"], 0), Question("q", ["a", "b"], 1)], delimiter="\n")
  assert model.pairs[:2] == [("q", "\na"), ("q", "\nb")]
  assert result["acc"] == 0.5  # of equal ones the first, as in NumPy's argmax


def test_a_broken_model_has_no_accuracy():
  with pytest.raises(CheckpointError, match="log-likelihoods of 'q' are not numbers"):
    evaluate_multiple_choice(Model({"a": float("nan"), "b": -1.0}), [Question("q", ["a", "b"], 0)])
