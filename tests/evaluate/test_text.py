"""Whole documents of files, each token scored once."""

import json
import math

import pytest

from deepseek_jax.checkpoint.load import open_saved_model
from deepseek_jax.errors import DataError
from deepseek_jax.evaluate import text
from deepseek_jax.evaluate.language_model import LanguageModel
from deepseek_jax.evaluate.text import evaluate_texts, text_sources
from tests.saved_models import TEXT, write_hugging_face


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  saved = open_saved_model(write_hugging_face(tmp_path_factory.mktemp("text") / "hf"))
  return LanguageModel(saved, saved.load_tokenizer(), batch=4)


def write(folder, texts):
  (folder / "many.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
  for i, of_file in enumerate(texts):
    (folder / f"{i}.txt").write_text(of_file)


def test_sums_over_documents_and_files(model, tmp_path, monkeypatch):
  texts = ["the words", "größer als ein Wort, länger als der Text – ☃", TEXT]
  write(tmp_path, texts)
  sources = text_sources([str(tmp_path / "*.txt"), str(tmp_path / "many.jsonl")])
  assert list(sources) == ["0", "1", "2", "many"]
  results = evaluate_texts(model, sources)
  assert [results[name].bytes for name in "012"] == [len(t.encode()) for t in texts]
  assert results["many"].items == 3 and results["many"].bytes == sum(len(t.encode()) for t in texts)
  expected = model.document_log_likelihoods(texts)
  assert results["many"].loss_sum == pytest.approx(-sum(r.log_prob for r in expected), rel=1e-6)
  assert results["many"].tokens == sum(len(model.tokenizer.encode(t)) for t in texts)
  assert results["1"].as_dict("documents")["bits_per_byte"] == pytest.approx(
    -expected[1].log_prob / math.log(2) / len(texts[1].encode()), rel=1e-5
  )
  monkeypatch.setattr(text, "CHARACTERS", 1)  # one document at a time
  assert evaluate_texts(model, {"many": sources["many"]})["many"].loss_sum == pytest.approx(
    results["many"].loss_sum, rel=1e-6
  )


def test_names_of_sources(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "b").mkdir()
  for name in ("a/x.txt", "b/x.txt", "b/y.jsonl.gz", "total.txt"):
    (tmp_path / name).write_text("x")
  sources = text_sources([str(tmp_path / "*" / "*"), str(tmp_path / "b")])
  assert list(sources) == ["x", str(tmp_path / "b/x.txt"), "y", str(tmp_path / "b")]
  assert len(sources[str(tmp_path / "b")]) == 2
  assert list(text_sources([str(tmp_path / "total.txt")])) == [str(tmp_path / "total.txt")]  # "total" is all of them


@pytest.mark.parametrize(
  ("files", "named", "message"),
  [
    ({}, "none.txt", "^--text: expected python-stdlib, key-value-retrieval, a file, a folder or a glob; there is no"),
    ({"a.bin": "x"}, "a.bin", "^--text: nothing at .* ends in .txt"),
    ({"a.txt": ""}, "a.txt", "^--text: a has no text to evaluate: .*a.txt"),
    (
      {"a.jsonl": '{"text": null}'},
      "a.jsonl",
      r"a.jsonl:1: the field 'text' is null, not text: set --skip_null to skip",
    ),
    ({"a.jsonl": '{"body": "x"}'}, "a.jsonl", r"a.jsonl:1 has no field 'text' .*: set --text_field to"),
    ({"a.txt": b"\xff"}, "a.txt", "is not UTF-8 at byte 0 .* take it out of --text"),
  ],
)
def test_text_that_cannot_be_used(model, tmp_path, files, named, message):
  for name, content in files.items():
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(DataError, match=message):
    evaluate_texts(model, text_sources([str(tmp_path / named)]))


def test_null_records_are_skipped_where_asked(model, tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "x"}\n')
  results = evaluate_texts(model, text_sources([str(tmp_path / "a.jsonl")]), skip_null=True)
  assert (results["a"].items, results["a"].bytes) == (1, 1)
