import importlib.util

import pytest

from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import ConfigError
from deepseek_jax.serve import load
from deepseek_jax.serve.chat_template import DEEPSEEK_LLM


def test_missing_packages_are_named(monkeypatch):
  load.check_packages()
  found = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "prometheus_client" else found(name))
  with pytest.raises(ConfigError, match="pip install prometheus-client"):
    load.check_packages()


def test_the_template_of_a_converted_workdir(tmp_path):
  folder = tmp_path / "hugging_face"
  folder.mkdir()
  (folder / "chat_template.jinja").write_text("{{ messages }}")
  (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
  tokens = {"bos_token": "<s>", "eos_token": "</s>"}
  byte = load_tokenizer("byte")
  assert load.load_chat_template(None, str(tmp_path), "byte", byte) == ("{{ messages }}", tokens, True)
  # Beside the tokenizer's file, too.
  (folder / "tokenizer.json").touch()
  elsewhere = str(tmp_path / "elsewhere")
  assert load.load_chat_template(None, elsewhere, str(folder / "tokenizer.json"), byte)[2]


def test_a_model_without_a_template(tmp_path):
  byte = load_tokenizer("byte")
  template, tokens, found = load.load_chat_template(None, str(tmp_path), "byte", byte)
  assert (template, found, tokens["eos_token"]) == (DEEPSEEK_LLM, False, byte.eos_token)


def test_a_template_that_is_none(tmp_path):
  path = tmp_path / "bad.jinja"
  path.write_text("{% for %}")
  with pytest.raises(ConfigError, match="no Jinja"):
    load.load_chat_template(str(path), str(tmp_path), "byte", load_tokenizer("byte"))
