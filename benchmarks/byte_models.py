"""Bits per byte of compressors and n-gram models, on the held-out split that `make train` evaluates on.

  python -m benchmarks.byte_models --config=tiny

gzip -9 and xz -9 compress the held-out text alone. The order-k models are byte n-grams, fitted on the train split and
interpolated down to the uniform distribution with Witten-Bell smoothing: with n(c) occurrences of the context c and
t(c) different bytes after it, p(x | c) = (n(cx) + t(c) p(x | c without its first byte)) / (n(c) + t(c)). As for the
network, the loss includes document separators, and the number of bytes does not.
"""

import lzma
import zlib

import numpy as np
from absl import flags

from deepseek_jax.data import pipeline
from deepseek_jax.flags import define_config_flags, load_config, parse, run_program


def main(argv: list[str]) -> int:
  values = flags.FlagValues()
  define_config_flags(values, "tiny")  # whose data is used; its tokenizer must be byte
  overrides = parse(argv, values, __doc__)
  data = pipeline.open_data(load_config(values.config, overrides).data, vocab=257, seed=0)
  train, heldout = token_stream(data.train), token_stream(data.heldout)
  text = heldout[heldout < 256].astype(np.uint8).tobytes()

  gzip = zlib.compressobj(9, wbits=31)
  bits = {
    "gzip -9": 8 * len(gzip.compress(text) + gzip.flush()),
    "xz -9": 8 * len(lzma.compress(text, preset=9)),
  }
  for order in (2, 3):
    bits[f"order-{order} bytes"] = -np.log2(ngram_probabilities(train, heldout, order, data.tokenizer.vocab)).sum()
  print(f"{len(text):,} held-out bytes after {len(train):,} ids to fit on")
  for name, total in bits.items():
    print(f"{name:<14}{total / len(text):6.3f} bits per byte")
  return 0


def token_stream(split: pipeline.ConcatSplit) -> np.ndarray:
  """int64 [n]: the ids of a split, its windows concatenated."""
  windows = split.tokens(np.arange(len(split)))
  return np.concatenate([windows[0, :1], windows[:, 1:].ravel()]).astype(np.int64)


def ngram_probabilities(train: np.ndarray, heldout: np.ndarray, order: int, vocab: int) -> np.ndarray:
  """float64 [len(heldout) - 1]: Witten-Bell probability of each id of `heldout` but the first, given `order` ids."""
  probability = np.full(len(heldout), 1 / vocab)
  for k in range(order + 1):
    grams, gram_counts = np.unique(ngram_codes(train, k + 1, vocab), return_counts=True)
    contexts, first, followers = np.unique(grams // vocab, return_index=True, return_counts=True)
    context_counts = np.add.reduceat(gram_counts, first)

    heldout_grams = ngram_codes(heldout, k + 1, vocab)  # from position k on; ids before keep their shorter context
    gram_count = lookup_counts(grams, gram_counts, heldout_grams)
    n, t = (lookup_counts(contexts, counts, heldout_grams // vocab) for counts in (context_counts, followers))
    lower_order = probability[k:]
    probability[k:] = np.where(n > 0, (gram_count + t * lower_order) / np.maximum(n + t, 1), lower_order)
  return probability[1:]


def ngram_codes(ids: np.ndarray, length: int, vocab: int) -> np.ndarray:
  """int64 [len(ids) - length + 1]: each n-gram of `length` ids as one number, the last id in the lowest digit."""
  code = np.zeros(len(ids) - length + 1, np.int64)
  for i in range(length):
    code = code * vocab + ids[i : i + len(code)]
  return code


def lookup_counts(keys: np.ndarray, counts: np.ndarray, queries: np.ndarray) -> np.ndarray:
  """The count of each query in the sorted `keys`, 0 if it is not among them."""
  index = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
  return np.where(keys[index] == queries, counts[index], 0)


if __name__ == "__main__":
  run_program(main)
