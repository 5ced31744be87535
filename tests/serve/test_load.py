import importlib.util

import jax
import pytest

from deepseek_jax.checkpoint.load import open_saved_model
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import ConfigError
from deepseek_jax.generate.request import Request, Sampling
from deepseek_jax.serve import load
from deepseek_jax.serve.chat_template import DEEPSEEK_LLM
from tests.saved_models import SEQ, write_hugging_face


def test_missing_packages_are_named(monkeypatch):
  load.check_packages()
  found = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "prometheus_client" else found(name))
  with pytest.raises(ConfigError, match="pip install prometheus-client"):
    load.check_packages()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_engine_in_another_dtype(tmp_path, dtype):
  saved = open_saved_model(write_hugging_face(tmp_path / "hf"))
  tokenizer = saved.load_tokenizer()
  flags = load.EngineFlags(
    max_batch=2, max_length=SEQ, scheduler="continuous", cache_tokens=0, token_budget=0, speculate=False, dtype=dtype,
    devices=1, tensor_parallel=1, expert_parallel=1,
  )  # fmt: skip
  engine = load.make_engine(saved, tokenizer, flags)
  engine.add(Request(0, (5, 6, 7), Sampling(max_tokens=3, temperature=0.0, ignore_eos=True)))
  outputs = []
  while engine.has_work:
    outputs += engine.step()
  assert sum(len(output.tokens) for output in outputs) == 3 and outputs[-1].finish_reason == "length"
  assert {str(array.dtype) for array in jax.tree.leaves(engine._weights[0])} == {dtype}


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
