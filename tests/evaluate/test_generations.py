"""Generations and their scores. What sacrebleu and rouge-score give is in tests/parity/test_generations.py."""

import importlib
import json

import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.evaluate.generations import Prompt, metric_packages, to_jsonl


@pytest.mark.parametrize("missing", ["sacrebleu", "rouge_score.rouge_scorer"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, missing):
  def import_module(name):
    if name == missing:
      raise ModuleNotFoundError(f"No module named {name!r}")
    return object()

  monkeypatch.setattr(importlib, "import_module", import_module)
  with pytest.raises(ConfigError, match=f"{missing}.*pip install 'sacrebleu' 'rouge-score'"):
    metric_packages()


def test_the_file_of_generations():
  lines = to_jsonl([Prompt("é", ["x", "y"]), Prompt("b", ["z"])], ["one\ntwo", "three"]).splitlines()
  assert [json.loads(line) for line in lines] == [
    {"prompt": "é", "references": ["x", "y"], "generation": "one\ntwo"},
    {"prompt": "b", "references": ["z"], "generation": "three"},
  ]
  assert "é" in lines[0]
