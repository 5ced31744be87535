"""The bytes that single tokens of a tokenizer.json stand for: a token may be a part of a character."""

import functools
import json
import re
from collections.abc import Callable
from typing import Any

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
WORD_MARK = "\u2581"  # SentencePiece's space


@functools.cache
def byte_level_alphabet() -> dict[str, int]:
  """GPT-2's character -> byte: printable Latin-1 stands for itself, other bytes for the characters from 256 on."""
  printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
  others = [byte for byte in range(256) if byte not in printable]
  return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def token_to_bytes(tokenizer: Any) -> Callable[[str], bytes | None]:
  """A function: token, as the vocabulary of the tokenizers.Tokenizer spells it -> its bytes.

  It returns None where the decoder is none of those known here; the tokenizer has to decode the token then.
  """
  kinds = set(re.findall(r'"type":\s*"(\w+)"', _decoder_json(tokenizer)))
  if "ByteLevel" in kinds:
    return _byte_level
  if kinds & {"ByteFallback", "Metaspace"}:
    return _sentencepiece
  return lambda token: None


def _decoder_json(tokenizer: Any) -> str:
  decoder = tokenizer.decoder
  return "" if decoder is None else json.dumps(json.loads(decoder.__getstate__()))


def _byte_level(token: str) -> bytes:
  """As the decoder ByteLevel: a token with a character that stands for no byte is text."""
  alphabet = byte_level_alphabet()
  try:
    return bytes(alphabet[character] for character in token)
  except KeyError:
    return token.encode()


def _sentencepiece(token: str) -> bytes:
  """As the decoders ByteFallback and Metaspace within a text."""
  if match := BYTE_TOKEN.fullmatch(token):
    return bytes([int(match[1], 16)])
  return token.replace(WORD_MARK, " ").encode()
