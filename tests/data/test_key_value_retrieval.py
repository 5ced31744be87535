"""Documents of key-value retrieval: what they ask for, and what text they are made of."""

import math
import random
import re

import numpy as np
import pytest

from deepseek_jax.config_sections import DataConfig
from deepseek_jax.data import key_value_retrieval as retrieval
from deepseek_jax.data.packing import is_heldout
from deepseek_jax.data.pipeline import open_data
from deepseek_jax.data.sources import find_source, read_stdlib
from deepseek_jax.errors import DataError
from tests.configs import write_texts

FILLER = [f"the words of text {i}\nand of its second line\n\n" for i in range(50)]


def test_every_query_has_the_value_that_its_key_was_set_to():
  document = retrieval.make_document(random.Random(0), FILLER)
  assert retrieval.DOCUMENT_BYTES <= len(document.text) < retrieval.DOCUMENT_BYTES + 200
  lines = list(re.finditer(r"^(set|get) ([A-Z])(\d)$", document.text, re.MULTILINE))
  asked = [line.start(3) for line in lines if line[1] == "get"]
  assert asked == [query.start for query in document.queries] and len(asked) > 200
  last_set, distances = {}, []
  for line in lines:
    if line[1] == "set":
      assert line[2] not in last_set  # or it was asked for
      last_set[line[2]] = line
    else:
      before = last_set.pop(line[2])
      assert before[3] == line[3]
      distances.append(line.start(3) - before.start(3))
  assert distances == [query.distance for query in document.queries]
  assert all(query.end - query.start == 1 for query in document.queries)


@pytest.mark.parametrize("longest", [1024, 2048])
def test_distances_are_log_uniform(longest):
  documents = [retrieval.make_document(random.Random(i), FILLER, longest=longest) for i in range(40)]
  distances = np.array([query.distance for document in documents for query in document.queries])
  assert (
    distances.min() >= retrieval.SHORTEST and distances.max() < longest + 100
  )  # a query waits for the end of a line
  logs = np.log(distances / retrieval.SHORTEST) / math.log(longest / retrieval.SHORTEST)
  shares, _ = np.histogram(logs, 4, (0, 1))
  assert (np.abs(shares / len(distances) - 0.25) < 0.12).all(), shares  # late by up to a line


def test_a_long_document_asks_over_all_of_its_length():
  document = retrieval.make_document(random.Random(0), FILLER, size=100_000, longest=100_000)
  assert max(query.start for query in document.queries) > 95_000
  assert max(query.distance for query in document.queries) > 25_000


def test_what_is_trained_on_is_not_evaluated_on():
  texts = list(read_stdlib())
  train, evaluation = retrieval.training_filler(texts), retrieval.evaluation_filler(texts)
  assert not any(is_heldout(text, 0.5) for text in train) and len(train) > 100
  size = sum(map(len, evaluation))
  assert size >= retrieval.EVALUATION_BYTES and all(is_heldout(text, 0.1) for text in evaluation)
  with pytest.raises(DataError, match="needs the interpreter's library"):
    retrieval.evaluation_filler(["no end of line"])


def test_it_is_made_once_and_the_same_everywhere(tmp_path):
  source = find_source(retrieval.NAME, tmp_path / "a")
  written = {file.path: file.mtime_ns for file in source.files}
  assert len(written) == retrieval.DOCUMENTS and source.size < 1.01 * retrieval.DOCUMENTS * retrieval.DOCUMENT_BYTES
  assert {file.path: file.mtime_ns for file in find_source(retrieval.NAME, tmp_path / "a").files} == written
  other = find_source(retrieval.NAME, tmp_path / "b")
  assert other.fingerprint(tmp_path / "x.json") == source.fingerprint(tmp_path / "y.json")
  assert not list(tmp_path.rglob("*.tmp-*"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(DataError, match="cannot write key-value-retrieval under .*set data.cache"):
    find_source(retrieval.NAME, tmp_path / "file" / "objects")


def test_it_has_its_share_of_the_samples(tmp_path):
  write_texts(tmp_path / "text", 30, 200)
  config = DataConfig(
    sources=(str(tmp_path / "text"), retrieval.NAME),
    weights=(0.75, 0.25),
    cache=str(tmp_path),
    seq=64,
    heldout_fraction=0.1,
  )
  data = open_data(config, 272, 0)
  tokens = data.train.tokens(data.window_ids(0, 400))
  asks = sum(bool(re.search(rb"[sg]et [A-Z]\d\n", row.astype(np.uint8).tobytes())) for row in tokens)
  assert 60 < asks <= 100  # of 100 windows; a few have no line of the kind
