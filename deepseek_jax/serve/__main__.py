"""Serves a model by OpenAI's HTTP API:  python -m deepseek_jax.serve --workdir=runs/tiny

--from=DIR serves a Hugging Face folder. Then: curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json"
-d '{"prompt": "def ", "max_tokens": 32}'. Only this machine is served unless --host names another address.
"""

import dataclasses
import os
import pathlib
import time
from typing import Any

from absl import flags

from deepseek_jax.console import current_console, printable
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import parse, run_program
from deepseek_jax.serve.engine_process import run
from deepseek_jax.serve.listen import is_local, listen, local_hosts, url
from deepseek_jax.serve.load import EngineFlags, check_packages, load_chat_template, make_engine
from deepseek_jax.serve.messages import Settings

API_KEY_VARIABLE = "DEEPSEEK_JAX_API_KEY"


def define_flags() -> flags.FlagValues:
  """The flags."""
  values = flags.FlagValues()
  string = lambda name, default, text: flags.DEFINE_string(name, default, text, flag_values=values)

  def integer(name: str, default: int | None, least: int, text: str) -> None:
    flags.DEFINE_integer(name, default, text, lower_bound=least, flag_values=values)

  string("workdir", None, "folder of a run, or its gs:// or s3:// URL")
  string("from", None, "a Hugging Face folder (config.json, *.safetensors, tokenizer.json)")
  integer("step", None, 0, "another checkpoint of the run than the newest")
  string(
    "tokenizer", None, "byte, deepseek-llm, deepseek-v3, or the path of a tokenizer.json; default: the model's own"
  )
  string("chat_template", None, "file of a Jinja chat template; default: the model's own, else DeepSeek LLM's format")
  string("served_model_name", None, "name of the model in requests; default: that of the folder")
  string("host", "127.0.0.1", "address to listen on; 0.0.0.0: all of this machine")
  integer("port", 8000, 0, "to listen on; 0: a free one")
  string("api_key", None, f"that clients have to send; default: ${API_KEY_VARIABLE}, which other users cannot see")
  integer("max_batch", 8, 1, "requests that run at a time")
  integer("max_queue", 64, 0, "requests that wait; more are answered with status 429")
  integer("max_length", 0, 0, "tokens of prompt and answer; 0: data.seq of the model")
  flags.DEFINE_enum(
    "scheduler",
    "continuous",
    ["continuous", "static"],
    "static: a batch ends before the next begins",
    flag_values=values,
  )
  integer("cache_tokens", 0, 0, "tokens in the key-value cache; 0: enough for --max_batch requests of --max_length")
  integer(
    "token_budget",
    0,
    0,
    "tokens of a step: one of each request that decodes, the rest of prompts; 0: the engine's default",
  )
  flags.DEFINE_boolean("speculate", False, "draft tokens by multi-token prediction", flag_values=values)
  flags.DEFINE_enum(
    "dtype",
    "",
    ["", "bfloat16", "float32"],
    "of parameters and computation; default: those of the model",
    flag_values=values,
  )
  integer("devices", 1, 1, "devices that the parameters are sharded over")
  integer("tensor_parallel", 1, 1, "of these devices, those that share heads and inner widths (tensor parallelism)")
  integer("expert_parallel", 1, 1, "of these devices, those that share the experts (expert parallelism)")
  return values


def main(argv: list[str]) -> int:
  """Serves until SIGTERM or Ctrl-C. Raises UserError for an error of the user's."""
  values = define_flags()
  parse(argv, values, __doc__)
  source = _check_flags(values)
  check_packages()
  listener = listen(values.host, values.port)  # early: a busy port is found before the weights are read

  # Imported late: --help and flag errors need no jax.
  from deepseek_jax.checkpoint.load import open_hugging_face, open_workdir
  from deepseek_jax.checkpoint.weights import has_hf_config, is_hugging_face

  if values.workdir and has_hf_config(values.workdir):
    raise ConfigError(f"--workdir={source} is a Hugging Face folder: give it as --from={source}")
  if not values.workdir and not is_hugging_face(source):
    raise ConfigError(f"--from={source} is a run and no Hugging Face folder: give it as --workdir={source}")
  saved = open_workdir(source, values.step) if values.workdir else open_hugging_face(source)
  tokenizer_name = values.tokenizer or saved.config.data.tokenizer
  tokenizer = saved.load_tokenizer(values.tokenizer)
  template, template_tokens, has_template = load_chat_template(values.chat_template, source, tokenizer_name, tokenizer)
  console = current_console()
  if not has_template:
    console.print("note     the model has no chat template: chats use DeepSeek LLM's format; --chat_template=FILE gives another", err=True)  # fmt: skip
  if values.max_length > saved.config.data.seq:
    console.print(f"note     --max_length={values.max_length} is longer than the {saved.config.data.seq} tokens that the model was made for: answers may get worse beyond these", err=True)  # fmt: skip
  api_key = values.api_key or os.environ.get(API_KEY_VARIABLE) or None
  if not is_local(listener) and api_key is None:
    console.print(f"note     {url(listener)} is open to other machines, without a key: --api_key or ${API_KEY_VARIABLE} sets one", err=True)  # fmt: skip
  engine_flags: dict[str, Any] = {field.name: values[field.name].value for field in dataclasses.fields(EngineFlags)}
  engine = make_engine(saved, tokenizer, EngineFlags(**engine_flags))
  model = values.served_model_name or pathlib.PurePath(source.rstrip("/")).name or source
  settings = Settings(
    model=model,
    tokenizer=tokenizer_name,
    vocab=tokenizer.vocab,
    add_bos=saved.add_bos(tokenizer),
    max_length=engine.max_length,
    max_batch=values.max_batch,
    max_queue=values.max_queue,
    chat_template=template,
    template_tokens=template_tokens,
    api_key=api_key,
    local_hosts=local_hosts(listener, values.host) if is_local(listener) and api_key is None else None,
    created=int(time.time()),
  )
  return run(engine, settings, listener, announcement(settings, url(listener)))


def announcement(settings: Settings, address: str) -> str:
  """What is printed once the server listens at `address`."""
  key = ' -H "Authorization: Bearer KEY"' if settings.api_key else ""
  return (
    f"serving  {printable(settings.model)} at {address}/v1, {settings.max_length} tokens of prompt and answer, "
    f"{settings.max_batch} requests at a time\n"
    f'try      curl {address}/v1/completions{key} -H "Content-Type: application/json" '
    """-d '{"prompt": "def ", "max_tokens": 32}'"""
  )


def _check_flags(values: flags.FlagValues) -> str:
  """The workdir or Hugging Face folder. Raises ConfigError for flags that do not go together."""
  source = values["from"].value
  if bool(values.workdir) == bool(source):
    raise ConfigError(
      "give one model: --workdir=DIR, a run, e.g. --workdir=runs/tiny, or --from=DIR, a Hugging Face folder"
    )
  if source and values.step is not None:
    raise ConfigError(f"--step={values.step} is a checkpoint of a --workdir, and --from has none: leave it out")
  if values.max_length == 1:
    raise ConfigError(
      "--max_length=1 has no room for a prompt and an answer: give at least 2, or 0 for the model's own"
    )
  if values.port > 65535:
    raise ConfigError(f"--port must be 0 to 65535, got {values.port}")
  return str(values.workdir or source)


if __name__ == "__main__":
  run_program(main)
