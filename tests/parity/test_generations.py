"""BLEU and ROUGE of generations by the packages that define them, through the program."""

import json

import pytest

from deepseek_jax.config_sections import SampleConfig
from deepseek_jax.evaluate.__main__ import main
from deepseek_jax.evaluate.generations import Prompt, evaluate_generations
from tests.saved_models import write_hugging_face

pytestmark = pytest.mark.parity
pytest.importorskip("sacrebleu", reason="make parity runs these in an environment with sacrebleu and rouge-score")


class Model:
  """Says what a test gives it."""

  def __init__(self, texts):
    self.texts = texts

  def generate(self, prompts, sample, stop, seed):
    return self.texts


def test_scores_of_known_texts():
  prompts = [Prompt("", ["the cat sat on a mat", "a cat was on the mat"]), Prompt("", ["hello there big world"])]
  scores, texts = evaluate_generations(
    Model([" the cat sat on the mat\n", "hello there my world"]), prompts, SampleConfig()
  )
  assert texts[0] == " the cat sat on the mat\n"
  # Of 1, 2, 3 and 4 words in a row 8 of 10, 6 of 8, 3 of 6 and 1 of 4 are in a reference; no brevity penalty.
  assert scores["bleu"] == pytest.approx(100 * (8 / 10 * 6 / 8 * 3 / 6 * 1 / 4) ** 0.25, abs=0.01)
  assert scores["bleu_signature"].startswith("nrefs:") and scores["prompts"] == 2
  # 5 of 6 words of the first are in the better reference, and 3 of 4 of the second.
  assert scores["rouge1"] == pytest.approx(100 * (5 / 6 + 3 / 4) / 2)
  assert scores["rougeL"] == pytest.approx(100 * (5 / 6 + 3 / 4) / 2)


def test_what_a_model_says_scores_in_full_against_itself(tmp_path):
  folder = write_hugging_face(tmp_path / "hf")
  flags = ["evaluate", f"--from={folder}", "--max_tokens=12", "--stop=\n\n", f"--json={tmp_path}/out.json"]
  flags.append(f"--generations={tmp_path}/said.jsonl")
  prompts = [{"prompt": "the words of", "reference": "x"}, {"prompt": "a text", "reference": "y"}]
  (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
  assert main([*flags, f"--generate={tmp_path}/prompts.jsonl"]) == 0
  said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
  assert [row["prompt"] for row in said] == ["the words of", "a text"]
  first = json.loads((tmp_path / "out.json").read_text())["generate"][f"{tmp_path}/prompts.jsonl"]
  lines = [json.dumps({"prompt": row["prompt"], "reference": row["generation"]}) for row in said]
  (tmp_path / "again.jsonl").write_text("\n".join(lines))
  assert main([*flags, f"--generate={tmp_path}/again.jsonl"]) == 0
  again = json.loads((tmp_path / "out.json").read_text())["generate"][f"{tmp_path}/again.jsonl"]
  assert again["bleu"] == pytest.approx(100) and again["rouge1"] > first["rouge1"]
