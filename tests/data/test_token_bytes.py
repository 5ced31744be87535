import pytest

from deepseek_jax.data.token_bytes import byte_level_alphabet, token_to_bytes

tokenizers = pytest.importorskip("tokenizers")


def with_decoder(decoder):
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  if decoder:
    made.decoder = decoder
  return token_to_bytes(made)


def test_the_alphabet_is_that_of_the_library():
  alphabet = byte_level_alphabet()
  assert set(alphabet) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  assert sorted(alphabet.values()) == list(range(256))
  text = "né 日\n"
  [(piece, _)] = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
  assert bytes(alphabet[character] for character in piece) == text.encode()


def test_byte_level_tokens():
  to_bytes = with_decoder(tokenizers.decoders.ByteLevel())
  assert to_bytes("Ġthe") == b" the"
  assert to_bytes("Ã") == b"\xc3"  # the first byte of a character of two
  assert to_bytes("<｜end▁of▁sentence｜>") == "<｜end▁of▁sentence｜>".encode()


def test_sentencepiece_tokens():
  decoders = tokenizers.decoders
  to_bytes = with_decoder(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]))
  assert (to_bytes("▁the"), to_bytes("<0xE2>"), to_bytes("<0x1>")) == (b" the", b"\xe2", b"<0x1>")
  assert with_decoder(decoders.Metaspace())("▁a") == b" a"


@pytest.mark.parametrize("decoder", [None, tokenizers.decoders.WordPiece()])
def test_other_decoders_have_to_decode(decoder):
  assert with_decoder(decoder)("a") is None
