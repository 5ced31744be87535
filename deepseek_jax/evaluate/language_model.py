"""A saved model that is asked in text: log-likelihoods of continuations and of documents, and generations."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from deepseek_jax.checkpoint.load import SavedModel
from deepseek_jax.config_sections import SampleConfig
from deepseek_jax.console import current_console
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import ConfigError
from deepseek_jax.evaluate.scoring import Request, Scorer, padded_batch
from deepseek_jax.generate.decoding import continue_ids, padded_length, to_sampling
from deepseek_jax.generate.engine import Engine, EngineConfig
from deepseek_jax.sharding import num_batch_shards


class LogLikelihood(NamedTuple):
  """Of a text: the sum of ln p over its tokens, whether each is the likeliest, and their number."""

  log_prob: float
  is_greedy: bool
  num_tokens: int


class LanguageModel:
  """A model and its tokenizer.

  Args:
    saved: where they are.
    tokenizer: of `saved`, as `SavedModel.load_tokenizer` gives it.
    devices: that the parameters are sharded over.
    batch: sequences in a pass; rounded up to a multiple of `devices`.
    seq: positions that it takes; None: those of its config.
    add_bos: whether prompts and contexts begin with bos; None: as `SavedModel.add_bos`. An empty one always does.
  """

  def __init__(
    self,
    saved: SavedModel,
    tokenizer: Tokenizer,
    devices: int = 1,
    batch: int = 8,
    seq: int | None = None,
    add_bos: bool | None = None,
  ):
    self.saved, self.tokenizer, self.batch = saved, tokenizer, batch
    self.seq = saved.config.data.seq if seq is None else seq
    self.add_bos = saved.add_bos(tokenizer) if add_bos is None else add_bos
    self.weights = saved.load(devices)
    self.scorer = Scorer(self.weights, saved.config.model, self.seq, batch)

  def encode(self, text: str) -> list[int]:
    """Ids of a prompt or context: with bos where it begins so, never empty."""
    ids = self.tokenizer.encode(text)
    return [self.tokenizer.bos, *ids] if self.add_bos or not ids else ids

  def encode_pair(self, context: str, continuation: str) -> Request:
    """`context` and `continuation` as ids of the whole text, split where the ids of the context end.

    Spaces at the end of the context go to the continuation, since a token often begins with the space before a word.
    Where nothing is left of the context it is bos. All as lm-evaluation-harness does.
    """
    stripped = context.rstrip()
    if not stripped:
      return Request([self.tokenizer.bos], self.tokenizer.encode(context + continuation))
    whole, ids = self.encode(context + continuation), self.encode(stripped)
    return Request(ids, whole[len(ids) :])

  def log_likelihoods(self, pairs: Sequence[tuple[str, str]], description: str = "scoring") -> list[LogLikelihood]:
    """Of each (context, continuation): the LogLikelihood of the continuation.

    Where both together are longer than the model takes, the beginning of the context is cut off; a note says how often.
    Raises DataError for a continuation that is longer, or empty.
    """
    requests = [self.encode_pair(*pair) for pair in pairs]
    too_long = sum(len(context) + len(continuation) - 1 > self.seq for context, continuation in requests)
    if too_long:
      self._note_truncated(too_long, len(requests))
    with current_console().count_progress(f"evaluate: {description}", len(requests)) as update:
      scores = self.scorer.score(requests, update)
    return [LogLikelihood(float(s.log_probs.sum()), bool(s.is_argmax.all()), len(s.log_probs)) for s in scores]

  def document_log_likelihoods(
    self,
    texts: Sequence[str],
    stride: int | None = None,
    update: Callable[[int], None] = lambda done: None,
  ) -> list[LogLikelihood]:
    """Of each of `texts`, a whole document after bos: every token is scored once, in windows that the model takes.

    stride: new tokens of each window after the first, see `rolling_windows`. update: as in `Scorer.score`, in windows.
    Raises ConfigError for a stride that is longer than the model takes.
    """
    if stride and stride > self.seq:
      raise ConfigError(f"stride={stride} is longer than the {self.seq} positions of a window: lower it")
    encoded = self.tokenizer.encode_batch(texts)
    windows = [rolling_windows(ids.tolist(), self.tokenizer.bos, self.seq, stride or self.seq) for ids, _ in encoded]
    scores = iter(self.scorer.score([window for of_text in windows for window in of_text], update))
    results = []
    for of_text in windows:
      of_windows = [next(scores) for _ in of_text]
      log_prob = sum(float(score.log_probs.sum()) for score in of_windows)
      is_greedy = all(score.is_argmax.all() for score in of_windows)
      results.append(LogLikelihood(log_prob, is_greedy, sum(len(score.log_probs) for score in of_windows)))
    return results

  def generate(
    self,
    prompts: Sequence[str],
    sample: SampleConfig,
    stop: Sequence[str] = (),
    seed: int = 0,
    description: str = "generating",
  ) -> list[str]:
    """The text that follows each of `prompts`: up to sample.max_tokens tokens, to the end of the document or a `stop`.

    A prompt that leaves no room for max_tokens loses its beginning; a note says how often. A prompt's text is the same
    in every batch, but for rounding. Raises ConfigError where max_tokens alone are as many as the model takes.
    """
    room = self.seq - sample.max_tokens
    if room < 1:
      raise ConfigError(
        f"max_tokens={sample.max_tokens} of {self.seq} positions leave no room for a prompt: lower it below {self.seq} (a "
        "task's max_gen_toks), or raise --seq"
      )
    ids = [self.encode(prompt) for prompt in prompts]
    if too_long := sum(len(prompt) > room for prompt in ids):
      self._note_truncated(too_long, len(ids))
    ids = [prompt[-room:] for prompt in ids]
    seeds = np.random.SeedSequence(seed).generate_state(max(len(ids), 1)).tolist()
    samplings, longest = [to_sampling(sample, of_prompt) for of_prompt in seeds], max(map(len, ids), default=1)
    weights, mesh = self.weights, self.weights.mesh
    sizes = EngineConfig(
      max_batch=padded_batch(max(len(ids), 1), self.batch, num_batch_shards(mesh)),
      max_length=padded_length(longest + sample.max_tokens, self.seq),
    )
    with current_console().count_progress(f"evaluate: {description}", len(ids)) as update, jax.set_mesh(mesh):
      model, tokenizer = self.saved.config.model, self.tokenizer
      engine = Engine(model, weights.params, weights.buffers, mesh, tokenizer.vocab, tokenizer.eos, sizes)
      generated = continue_ids(
        engine,
        ids,
        samplings[: len(ids)],
        lambda ids: any(text in tokenizer.decode(ids) for text in stop),
        update,
      )
    return [before(tokenizer.decode(of_prompt), stop) for of_prompt in generated]

  def _note_truncated(self, count: int, total: int) -> None:
    current_console().print(
      f"note     {count:,} of {total:,} are longer than the {self.seq:,} positions of the model: their beginning is cut off",
      err=True,
    )


def before(text: str, stop: Sequence[str]) -> str:
  """`text` before the first of any of `stop`."""
  return text[: min((at for part in stop if (at := text.find(part)) >= 0), default=len(text))]


def rolling_windows(ids: Sequence[int], bos: int, seq: int, stride: int) -> list[Request]:
  """Requests that score each of `ids` once: the first `seq` after `bos`, then `stride` at a time.

  Each window after the first has as much context as fits into `seq` positions. With stride = seq they are the windows of
  lm-evaluation-harness (its loglikelihood_rolling); a smaller stride gives more context, and takes more passes.
  """
  windows, scored = [], 0
  while scored < len(ids):
    end = min(len(ids), scored + (stride if scored else seq))
    start = max(end - seq - 1, -1)  # of the first input, where -1 is bos
    context = ids[start:scored] if start >= 0 else [bos, *ids[:scored]]
    windows.append(Request(context, ids[scored:end]))
    scored = end
  return windows
