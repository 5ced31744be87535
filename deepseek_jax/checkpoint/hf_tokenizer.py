"""What lies beside the weights in a Hugging Face folder: the tokenizer, chat templates, ids of special tokens, code."""

import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

from deepseek_jax.checkpoint.hf_config import hf_model_type
from deepseek_jax.checkpoint.hf_files import CONFIG_FILE
from deepseek_jax.checkpoint.hf_model import read_config_json
from deepseek_jax.checkpoint.model_args import TOKENIZERS
from deepseek_jax.config_sections import TOKENIZER_SIZES
from deepseek_jax.console import current_console
from deepseek_jax.data.tokenizer import NO_TOKENIZER, Tokenizer, load_tokenizer
from deepseek_jax.errors import CheckpointError, DataError
from deepseek_jax.model_config import ModelConfig

HF_FILES_FOLDER = "hugging_face"  # in a converted workdir: the source's config and tokenizer, for the export back
TOKENIZER_FILE, GENERATION_FILE = "tokenizer.json", "generation_config.json"
TOKENIZER_FILES = (
  TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
  "chat_template.json", "additional_chat_templates", "tokenizer.model", "vocab.json", "merges.txt", "tokenization_*.py",
)  # fmt: skip
# The code that `auto_map` of config.json names, without which transformers has no class for MoE-16B. It is never run here.
CODE_FILES = ("configuration_*.py", "modeling_*.py")
TOKEN_IDS = ("bos_token_id", "eos_token_id")


def copy_files(source: pathlib.Path, folder: pathlib.Path, names: tuple[str, ...]) -> None:
  """Copies the files and folders of `source` that match one of `names` to `folder`, which is made if it is missing."""
  folder.mkdir(exist_ok=True)
  for path in (path for name in names for path in sorted(source.glob(name))):
    if path.is_dir():
      shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
    elif path.is_file():
      shutil.copyfile(path, folder / path.name)


def imported_tokenizer(source: pathlib.Path, target: pathlib.Path, vocab: int, name: str) -> str:
  """data.tokenizer of the workdir `target` that is made of the Hugging Face folder `source`.

  That is `name` if it is not empty, else the copied tokenizer.json, else the one of DeepSeek with a model of `vocab`
  rows, else NO_TOKENIZER. Prints a note for what the user should know of it.

  Raises DataError where `name` cannot be loaded, and CheckpointError where a tokenizer has ids beyond `vocab`.
  """
  if name in TOKENIZER_SIZES:
    _check_size(name, TOKENIZER_SIZES[name], vocab)
    return name
  if name and name != NO_TOKENIZER:
    path = os.path.abspath(os.path.expanduser(name))
    _check_size(path, load_tokenizer(path).vocab, vocab)
    return path
  if not name and (source / TOKENIZER_FILE).exists():
    _check_copied_tokenizer(source, vocab)
    return str(target / HF_FILES_FOLDER / TOKENIZER_FILE)
  if not name and vocab in TOKENIZERS:
    _note(f"{source} has no {TOKENIZER_FILE}: data.tokenizer={TOKENIZERS[vocab]}, by the {vocab} rows of its embedding")
    return TOKENIZERS[vocab]
  if not name:
    _note(
      f"{source} has no {TOKENIZER_FILE}: data.tokenizer={NO_TOKENIZER}; generate takes one by --tokenizer, train by "
      "--config.data.tokenizer"
    )
  return NO_TOKENIZER


def _check_size(name: str, size: int, vocab: int) -> None:
  if size > vocab:
    raise CheckpointError(
      f"the tokenizer {name} has ids up to {size - 1}, but the model has {vocab} rows of embedding: they do not belong "
      "together; give the model's with --tokenizer"
    )


def _check_copied_tokenizer(source: pathlib.Path, vocab: int) -> None:
  """Checks tokenizer.json of `source` as far as it can be loaded here, with notes for what does not fit together."""
  try:
    tokenizer = load_tokenizer(str(source / TOKENIZER_FILE))
  except DataError as error:
    _note(f"the tokenizer is copied, but cannot be loaded here: {error}")
    return
  _check_size(str(source / TOKENIZER_FILE), tokenizer.vocab, vocab)
  if not tokenizer.add_bos_token and tokenizer.bos != tokenizer.eos:
    _note(
      "add_bos_token=false in tokenizer_config.json: generate begins prompts without bos, as transformers does; documents "
      "of a training run begin with it"
    )
  raw = read_config_json(source)
  for key, token in zip(TOKEN_IDS, (tokenizer.bos, tokenizer.eos), strict=True):
    if raw.get(key) is not None and token not in _as_list(raw[key]) and tokenizer.bos != tokenizer.eos:
      _note(f"{key}={raw[key]} in {CONFIG_FILE}, but {token} by the tokenizer, which is what training and sampling use")


Copies = list[tuple[pathlib.Path, tuple[str, ...]]]  # (folder, names), as `copy_files` takes them


def exported_files(workdir: pathlib.Path, name: str, model: ModelConfig) -> tuple[dict[str, Any], Copies]:
  """Of a workdir whose data.tokenizer is `name`: (config.json of its source, what to copy to the export).

  The source is the Hugging Face folder that the workdir was converted from, or that its tokenizer lies in. The ids of
  special tokens are the source's, unchanged, unless the workdir has another tokenizer by now that begins or ends
  documents with other tokens. transformers takes 1 and 2 if they are missing.
  """
  path, names = pathlib.Path(name), (NO_TOKENIZER, TOKENIZERS.get(model.vocab))
  hf_files = _source_folder((workdir / HF_FILES_FOLDER, path.parent), hf_model_type(model))
  original = read_config_json(hf_files) if hf_files else {}
  code: Copies = [(hf_files, CODE_FILES)] if hf_files else []
  generation: Copies = [(hf_files, (GENERATION_FILE,))] if hf_files else []
  tokenizer_files: Copies = [(path.parent, TOKENIZER_FILES)] if name not in TOKENIZER_SIZES and path.is_file() else []
  if hf_files and (name in names or path.parent == hf_files or path.parent.name == HF_FILES_FOLDER):
    return original, code + generation + [(hf_files, TOKENIZER_FILES)]
  try:
    tokenizer = load_tokenizer(name)
  except DataError as error:
    _note(f"{CONFIG_FILE} has no bos_token_id and no eos_token_id: {error}")
    return _without_token_ids(original), code + tokenizer_files
  if _has_token_ids(original, tokenizer):
    return original, code + generation + tokenizer_files
  ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
  return _without_token_ids(original) | ids, code + tokenizer_files


def _source_folder(folders: Iterable[pathlib.Path], model_type: str) -> pathlib.Path | None:
  """The first of `folders` that has the config.json of a model of this type."""
  for folder in folders:
    if (folder / CONFIG_FILE).is_file() and read_config_json(folder).get("model_type") == model_type:
      return folder
  return None


def copy_exported_files(copies: Copies, tokenizer: str, target: pathlib.Path) -> None:
  """Copies what lies beside the weights to the Hugging Face folder `target`; `tokenizer` is data.tokenizer."""
  for folder, names in copies:
    copy_files(folder, target, names)
  if tokenizer not in TOKENIZER_SIZES and pathlib.Path(tokenizer).is_file():
    shutil.copyfile(tokenizer, target / TOKENIZER_FILE)  # it may have another name


def _has_token_ids(raw: Mapping[str, Any], tokenizer: Tokenizer) -> bool:
  """Whether bos_token_id and eos_token_id of `raw` are those of `tokenizer`; eos may be one of several."""
  return raw.get("bos_token_id") == tokenizer.bos and tokenizer.eos in _as_list(raw.get("eos_token_id"))


def _without_token_ids(raw: Mapping[str, Any]) -> dict[str, Any]:
  """`raw` without the ids of special tokens, which are another tokenizer's."""
  return {key: value for key, value in raw.items() if not key.endswith("_token_id")}


def _as_list(value: Any) -> list[Any]:
  return value if isinstance(value, list) else [value]


def _note(text: str) -> None:
  current_console().print(f"note     {text}")
