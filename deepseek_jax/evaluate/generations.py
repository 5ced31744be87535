"""Generations against references: BLEU by sacrebleu, ROUGE by rouge-score."""

import importlib
import itertools
import json
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

from deepseek_jax.config_sections import SampleConfig
from deepseek_jax.errors import ConfigError
from deepseek_jax.evaluate.language_model import LanguageModel
from deepseek_jax.evaluate.records import read_records

ROUGE = ("rouge1", "rouge2", "rougeL")


class Prompt(NamedTuple):
  """A prompt and the texts that its generation is compared with."""

  prompt: str
  references: list[str]


def read_prompts(path: str) -> list[Prompt]:
  """The prompts of a .jsonl file: {"prompt": text, "references": [texts] or "reference": text}.

  Raises DataError, with file and line, for a field that is missing or wrong.
  """
  prompts = []
  for record in read_records(path, "generate"):
    several = record.name_of("references", "reference") == "references"
    references = record.texts("references", at_least=1) if several else [record.text("reference")]
    prompts.append(Prompt(record.text("prompt"), references))
  return prompts


def metric_packages() -> tuple[ModuleType, ModuleType]:
  """(sacrebleu, rouge_score.rouge_scorer). Raises ConfigError with the pip command where one is missing."""
  try:
    return importlib.import_module("sacrebleu"), importlib.import_module("rouge_score.rouge_scorer")
  except ImportError as error:
    raise ConfigError(
      f"--generate needs the packages sacrebleu and rouge-score ({error}): pip install 'sacrebleu' 'rouge-score'"
    ) from None


def evaluate_generations(
  model: LanguageModel, prompts: Sequence[Prompt], sample: SampleConfig, stop: Sequence[str] = (), seed: int = 0
) -> tuple[dict[str, Any], list[str]]:
  """(scores, generated texts) of `prompts`. Arguments as `LanguageModel.generate`.

  The scores:
    bleu: of the corpus, 0 to 100, with sacrebleu's own tokenization; bleu_signature says which.
    rouge1, rouge2, rougeL: F-measure against the best reference, without stemming, 0 to 100, the mean over prompts.
    prompts: their number.

  White space at the ends of a text is not compared. Raises ConfigError where a package is missing.
  """
  sacrebleu, rouge_scorer = metric_packages()
  texts = model.generate([prompt.prompt for prompt in prompts], sample, stop, seed)
  outputs = [text.strip() for text in texts]
  # sacrebleu takes one list for each place among the references; where a prompt has fewer, None.
  by_place = list(itertools.zip_longest(*(prompt.references for prompt in prompts)))
  bleu = sacrebleu.BLEU()
  scores: dict[str, Any] = {"bleu": bleu.corpus_score(outputs, by_place).score}
  scores["bleu_signature"] = str(bleu.get_signature())
  scorer = rouge_scorer.RougeScorer(list(ROUGE))
  of_prompts = [scorer.score_multi(prompt.references, text) for prompt, text in zip(prompts, outputs, strict=True)]
  scores |= {name: 100 * sum(score[name].fmeasure for score in of_prompts) / len(prompts) for name in ROUGE}
  return scores | {"prompts": len(prompts)}, texts


def to_jsonl(prompts: Sequence[Prompt], texts: Sequence[str]) -> str:
  """One JSON object on each line: prompt, references, and the generation."""
  rows = (
    {"prompt": prompt.prompt, "references": prompt.references, "generation": text}
    for prompt, text in zip(prompts, texts, strict=True)
  )
  return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
