"""Multiple choice by log-likelihood: the choice is taken that the model finds likeliest after the question."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deepseek_jax.errors import CheckpointError, DataError
from deepseek_jax.evaluate.language_model import LanguageModel
from deepseek_jax.evaluate.records import read_records
from deepseek_jax.evaluate.results import mean_and_stderr


class Question(NamedTuple):
  """A prompt, its choices, and the index of the right one."""

  prompt: str
  choices: list[str]
  answer: int


def read_questions(path: str) -> list[Question]:
  """The questions of a .jsonl file: {"prompt" or "question": text, "choices": [texts], "answer": index from 0}.

  Raises DataError, with file and line, for a field that is missing or wrong.
  """
  questions = []
  for record in read_records(path, "multiple_choice"):
    choices, answer = record.texts("choices", at_least=2), record.fields[record.name_of("answer")]
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
      raise DataError(
        f"{record.location}: the field 'answer' should be the index of the right choice, 0 to {len(choices) - 1}, "
        f"got {answer!r:.60}"
      )
    questions.append(Question(record.text("prompt", "question"), choices, answer))
  return questions


def evaluate_multiple_choice(
  model: LanguageModel, questions: Sequence[Question], delimiter: str = " ", name: str = "multiple choice"
) -> dict[str, float | int | None]:
  """Accuracies of `questions`, each with its standard error, as lm-evaluation-harness defines them.

  - acc: the choice with the highest log-likelihood is the right one.
  - acc_norm: of log-likelihood over the characters of the choice. acc_bytes: over its UTF-8 bytes.

  delimiter: between prompt and choice (target_delimiter there). name: for the progress that is shown.

  Raises CheckpointError for a model whose log-likelihoods are not numbers.
  """
  pairs = [(question.prompt, delimiter + choice) for question in questions for choice in question.choices]
  log_probs = iter([result.log_prob for result in model.log_likelihoods(pairs, name)])
  correct: dict[str, list[float]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
  for question in questions:
    of_choices = np.array([next(log_probs) for _ in question.choices])
    if np.isnan(of_choices).any():
      raise CheckpointError(
        f"the log-likelihoods of {question.prompt!r:.60} are not numbers: the weights are not finite"
      )
    characters = np.array([len(choice) for choice in question.choices])
    size = np.array([len(choice.encode()) for choice in question.choices])
    scores = {"acc": of_choices, "acc_norm": of_choices / characters, "acc_bytes": of_choices / size}
    for metric, of_metric in scores.items():
      correct[metric].append(float(np.argmax(of_metric) == question.answer))
  result: dict[str, float | int | None] = {}
  for metric, values in correct.items():
    result[metric], result[f"{metric}_stderr"] = mean_and_stderr(values)
  return result | {"questions": len(questions)}
