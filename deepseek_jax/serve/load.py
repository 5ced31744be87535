"""From flags to an engine and what the HTTP process has to know."""

import dataclasses
import importlib.util
import pathlib
from typing import TYPE_CHECKING

from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import ConfigError
from deepseek_jax.serve.engine_process import Engine

if TYPE_CHECKING:  # it imports jax
  from deepseek_jax.checkpoint.load import SavedModel

PACKAGES = {
  "starlette": "starlette",
  "uvicorn": "uvicorn",
  "prometheus_client": "prometheus-client",
  "jinja2": "jinja2",
}


@dataclasses.dataclass(frozen=True)
class EngineFlags:
  """Flags that are the engine's.

  Attributes:
    max_batch: requests that run at a time.
    max_length: tokens of prompt and answer; 0: data.seq of the model.
    scheduler: continuous, or static: a batch ends before the next begins.
    cache_tokens: of the key-value cache; 0: enough for max_batch requests of max_length.
    token_budget: tokens that a step computes; 0: the engine's own.
    speculate: draft tokens with the model's multi-token prediction.
    dtype: of parameters and computation; "": those of the model.
    devices: that the parameters are sharded over.
    tensor_parallel, expert_parallel: of these, the sizes of two mesh axes; what is left is FSDP.
  """

  max_batch: int
  max_length: int
  scheduler: str
  cache_tokens: int
  token_budget: int
  speculate: bool
  dtype: str
  devices: int
  tensor_parallel: int
  expert_parallel: int


def check_packages() -> None:
  """Raises ConfigError where a package is missing that the server needs."""
  missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
  if missing:
    raise ConfigError(
      f"the server needs {', '.join(missing)}: pip install {' '.join(missing)}, or install the extra serve"
    )


def make_engine(saved: "SavedModel", tokenizer: Tokenizer, flags: EngineFlags) -> Engine:
  """An engine with the weights of `saved`, which has compiled its programs. Raises ConfigError for flags that do not fit."""
  from deepseek_jax.generate import engine

  model = saved.config.model
  if flags.dtype:
    # No config has parameters in bfloat16, which is no dtype to train in: they are read in it.
    model = dataclasses.replace(model, param_dtype="float32", compute_dtype=flags.dtype)
  sizes = engine.EngineConfig(
    max_batch=flags.max_batch,
    max_length=flags.max_length or saved.config.data.seq,
    cache_tokens=flags.cache_tokens,
    is_static=flags.scheduler == "static",
    speculate=flags.speculate,
    token_budget=flags.token_budget,
  )
  engine.check_engine(model, sizes)  # before the weights are read
  weights = saved.load(flags.devices, model, flags.tensor_parallel, flags.expert_parallel, flags.dtype or None)
  made = engine.Engine(
    model, weights.params, weights.buffers, weights.mesh, tokenizer.vocab, tokenizer.eos, sizes,
    f"{saved.source} {saved.step}",
  )  # fmt: skip
  made.warm_up()
  return made


def load_chat_template(
  file: str | None, source: str, tokenizer_name: str, tokenizer: Tokenizer
) -> tuple[str, dict[str, str], bool]:
  """(Jinja, its special tokens, whether the model came with it or --chat_template gave it), checked.

  file: of --chat_template. source: the workdir or Hugging Face folder. Raises ConfigError where it cannot be used.
  """
  from deepseek_jax.checkpoint.hf_tokenizer import HF_FILES_FOLDER
  from deepseek_jax.serve.chat_template import DEEPSEEK_LLM, ChatTemplate, find_chat_template

  folders = [pathlib.Path(source), pathlib.Path(source, HF_FILES_FOLDER)]
  path = pathlib.Path(tokenizer_name).expanduser()
  if path.is_file():  # a path, not the name of a tokenizer
    folders.append(path.parent)
  found, named = find_chat_template(file, folders)
  tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token} | named
  given = {name: text for name, text in tokens.items() if text is not None}
  template = DEEPSEEK_LLM if found is None else found
  ChatTemplate(template, given)
  return template, given, found is not None
