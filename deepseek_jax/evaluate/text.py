"""Bits per byte of documents in files: whole documents, each token scored once."""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence

from deepseek_jax.config_sections import DataConfig
from deepseek_jax.console import current_console
from deepseek_jax.data.cache import cache_root
from deepseek_jax.data.readers import read_documents, reader_suffix
from deepseek_jax.data.sources import SourceFile, find_source
from deepseek_jax.errors import DataError
from deepseek_jax.evaluate.language_model import LanguageModel
from deepseek_jax.evaluate.results import TOTAL, TextResult

CHARACTERS = 1 << 20  # of the documents that are scored together

# How readers of training data call what flags say here.
FLAG_NAMES = {"data.sources": "--text", "data.text_field": "--text_field", "data.skip_null=true": "--skip_null"}


def text_sources(names: Sequence[str]) -> dict[str, list[SourceFile]]:
  """{source: its files} of the entries of --text, each a file, a folder, a glob or python-stdlib.

  A file and each file of a glob are a source of the name of the file without suffix, or its path where several have
  that name, or it is TOTAL. A folder and python-stdlib are one source. Raises DataError where there is none.
  """
  sources: dict[str, list[SourceFile]] = {}
  for name in names:
    with flag_names():
      files = find_source(name, cache_root(DataConfig()) / "objects").files
    if name == "python-stdlib" or pathlib.Path(name).expanduser().is_dir():
      sources[name] = list(files)
      continue
    for file in files:
      short = file.path.name.removesuffix(str(reader_suffix(file.path)))
      sources[str(file.path) if short in (TOTAL, *sources) else short] = [file]
  return sources


@contextlib.contextmanager
def flag_names() -> Iterator[None]:
  """Errors about training data in the block name the flags of this program instead of fields of the config."""
  try:
    yield
  except DataError as error:
    message = str(error)
    for field, flag in FLAG_NAMES.items():
      message = message.replace(field, flag)
    raise DataError(message) from None


def evaluate_texts(
  model: LanguageModel,
  sources: dict[str, list[SourceFile]],
  text_field: str = "text",
  skip_null: bool = False,
  stride: int | None = None,
) -> dict[str, TextResult]:
  """{source: TextResult} of the documents of `sources`.

  Args:
    sources: as `text_sources` gives them.
    text_field, skip_null: of .jsonl and .parquet files, as in training.
    stride: as in `LanguageModel.document_log_likelihoods`.

  Raises DataError for what cannot be read, and for a source without text.
  """
  return {name: _evaluate_source(model, name, files, text_field, skip_null, stride) for name, files in sources.items()}


def _evaluate_source(
  model: LanguageModel, name: str, files: Sequence[SourceFile], text_field: str, skip_null: bool, stride: int | None
) -> TextResult:
  result = TextResult()
  with current_console().byte_progress(f"evaluate: {name}", sum(file.size for file in files)) as update:
    for texts, bytes_read in _batches(files, text_field, skip_null):
      scores = model.document_log_likelihoods(texts, stride)
      result.loss_sum -= sum(score.log_prob for score in scores)
      result.tokens += sum(score.num_tokens for score in scores)
      result.bytes += sum(len(text.encode()) for text in texts)
      result.items += len(texts)
      update(bytes_read)
  if not result.tokens:
    raise DataError(f"--text: {name} has no text to evaluate: {', '.join(str(file.path) for file in files[:3])}")
  return result


def _batches(files: Sequence[SourceFile], text_field: str, skip_null: bool) -> Iterator[tuple[list[str], int]]:
  """Yields (documents of about CHARACTERS together, bytes of `files` read so far)."""
  texts: list[str] = []
  previous_files = characters = bytes_read = 0
  with flag_names():
    for file in files:
      for document in read_documents(file.path, text_field, skip_null):
        if document.text is None:
          continue
        texts.append(document.text)
        characters, bytes_read = characters + len(document.text), previous_files + document.bytes_read
        if characters >= CHARACTERS:
          yield texts, bytes_read
          texts, characters = [], 0
      previous_files += file.size
  if texts:
    yield texts, previous_files
