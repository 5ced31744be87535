"""Every error of a file of questions names file, line and field."""

import pytest

from deepseek_jax.errors import DataError
from deepseek_jax.evaluate.generations import read_prompts
from deepseek_jax.evaluate.multiple_choice import read_questions
from deepseek_jax.evaluate.records import read_records


def write(tmp_path, text):
  path = tmp_path / "file.jsonl"
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return str(path)


def test_lines_without_empty_ones(tmp_path):
  records = read_records(write(tmp_path, '{"a": "x\\u2028y"}\r\n\n{"a": "\u2028"}\n'), "generate")
  assert [r.fields for r in records] == [{"a": "x\u2028y"}, {"a": "\u2028"}]
  assert records[1].location.endswith("file.jsonl:3")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "--generate=.*file.jsonl is empty"),
    ("\n \n", "is empty: write one JSON object on each line"),
    (b"\xff\n", "is not UTF-8 at byte 0"),
    ('{"prompt": "a"\n', "file.jsonl:1 is not a JSON object: .*; write one object on each line"),
    ('\n["a"]\n', r"file.jsonl:2 is not a JSON object, but \['a'\]"),
    ("[" * 100_000, "file.jsonl:1 is not a JSON object"),
    ('{"prompt": "a\\ud800", "reference": "b"}', "file.jsonl:1 has half of a surrogate pair"),
    ('{"reference": "a"}', "file.jsonl:1 has no field 'prompt'; its fields: reference"),
    ("{}", "has no field 'references' or 'reference'; its fields: none"),
    ('{"prompt": 3, "reference": "a"}', "the field 'prompt' should be text, got 3"),
    ('{"prompt": "a", "references": "a"}', "the field 'references' should be a list of texts, none empty, got 'a'"),
    ('{"prompt": "a", "references": []}', "the field 'references' has 0 texts: give at least 1"),
  ],
)
def test_prompts_that_cannot_be_used(tmp_path, text, message):
  with pytest.raises(DataError, match=message):
    read_prompts(write(tmp_path, text))


QUESTION = '{"question": "a", "choices": ["b", "c"], "answer": %s}'


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ('{"question": "a"}', ":1 has no field 'choices'; its fields: question"),
    ('{"question": "a", "choices": ["b"], "answer": 0}', "the field 'choices' has 1 texts: give at least 2"),
    ('{"question": "a", "choices": ["b", ""], "answer": 0}', "a list of texts, none empty"),
    ('{"question": "a", "choices": ["b", "c"]}', "has no field 'answer'"),
    ('{"choices": ["b", "c"], "answer": 0}', "has no field 'prompt' or 'question'"),
    (QUESTION % "0" + "\n" + QUESTION % "2", ":2: the field 'answer' should be the index of the right choice, 0 to 1, got 2"),
    (QUESTION % '"B"', "0 to 1, got 'B'"),
    (QUESTION % "true", "0 to 1, got True"),
    (QUESTION % "-1", "0 to 1, got -1"),
  ],
)  # fmt: skip
def test_questions_that_cannot_be_used(tmp_path, text, message):
  with pytest.raises(DataError, match=message):
    read_questions(write(tmp_path, text))


def test_what_is_read(tmp_path):
  (question,) = read_questions(write(tmp_path, QUESTION % "1"))
  assert question == ("a", ["b", "c"], 1)
  prompts = read_prompts(write(tmp_path, '{"prompt": "a", "reference": ""}\n{"prompt": "", "references": ["b", "c"]}'))
  assert prompts == [("a", [""]), ("", ["b", "c"])]


def test_a_file_that_is_not_there(tmp_path):
  with pytest.raises(DataError, match="--generate=/nowhere.jsonl cannot be read: No such file"):
    read_records("/nowhere.jsonl", "generate")
