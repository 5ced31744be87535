"""Config files as text: every value with its reason, as ruff leaves it, and nothing of the user's text is code."""

import dataclasses

import pytest

from deepseek_jax.config import Config
from deepseek_jax.config_sections import DataConfig
from deepseek_jax.flags import load_config
from deepseek_jax.new.config_file import format_python, format_value
from deepseek_jax.schema import flatten_config


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (9999, "9999"),
    (12_345_678, "12_345_678"),
    (-1, "-1"),
    (0.0, "0.0"),
    (0.1, "0.1"),
    (6.02e-4, "6.02e-4"),
    (1e-20, "1e-20"),
    (10_000.0, "10000.0"),
    (1e20, "1e20"),
    (True, "True"),
    ((0.5,), "(0.5,)"),
    ((1, 20_000), "(1, 20_000)"),
    ("a", '"a"'),
    ("it's", '"it\'s"'),
    ('a"b', "'a\"b'"),
    ("a\\b", '"a\\\\b"'),
  ],
)
def test_values_as_python(value, text):
  assert format_value(value) == text and eval(text) == value  # noqa: S307 - a test of what is written as Python


def test_a_file_is_its_config_whatever_the_text_says(tmp_path):
  hostile = '""" + print(1) #\\'
  config = dataclasses.replace(
    Config(), name=hostile, data=DataConfig(sources=(hostile, "it's")), schedule=dataclasses.replace(Config().schedule, steps=7)
  )  # fmt: skip
  reasons = {path: f"reason of {path}" for path in flatten_config(config)}
  path = tmp_path / "mine.py"
  path.write_text(format_python(config, f"Title {hostile}", [f"a line {hostile}", "", "b"], reasons))
  assert load_config(str(path)) == config


def test_a_value_without_a_reason_is_an_error():
  with pytest.raises(LookupError, match=r"no reason is given for data\.sources"):
    format_python(Config(), "title", [], {"train.steps": "why"})
