"""An engine that continues many prompts at once: a queue, a cache in pages, and two compiled programs on a mesh.

Requests are added at any time; each step computes chunks of prompts, within a budget of tokens, and then the next token
of every sequence that runs. With several processes all of them make the same calls.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from deepseek_jax.compilation_cache import count_compilations
from deepseek_jax.errors import ConfigError
from deepseek_jax.generate import scheduler
from deepseek_jax.generate.pages import PagePool
from deepseek_jax.generate.programs import Chunk, NewTokens, Sampled, decode_program, new_state, prefill_program
from deepseek_jax.generate.request import EngineStats, Output, Request, TokenLogprobs
from deepseek_jax.generate.sampling import stack_rules
from deepseek_jax.generate.scheduler import Scheduler
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.sharding import num_batch_shards
from deepseek_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """Sizes of an engine.

  Attributes:
    max_batch: sequences that run at a time; rounded up to a multiple of the shards of the batch.
    max_length: tokens of a prompt and its answer.
    cache_tokens: that the key-value cache has room for; 0: for max_batch sequences of max_length.
    page_size: tokens of a page.
    chunk: tokens of a prompt that are computed at a time; 0: 32 on CPUs, where a row costs as much in any batch, else 256.
    token_budget: of a step: one for each sequence that decodes, the rest for chunks of prompts, of which one always runs;
      0: four chunks.
    is_static: static batching instead of continuous, to compare with.
    speculate: draft the token after the next by the model's own multi-token prediction.
  """

  max_batch: int = 8
  max_length: int = 2048
  cache_tokens: int = 0
  page_size: int = 16
  chunk: int = 0
  token_budget: int = 0
  is_static: bool = False
  speculate: bool = False


class Engine:
  """Continues prompts of token ids.

  Args:
    model: its config; the engine computes as `ModelConfig.for_sampling` says.
    params, buffers: of the model, on `mesh`.
    mesh: of the params. It need not be set.
    vocab, eos: of the tokenizer.
    config: sizes.
    weights: a name of the weights, for the prefix cache.

  Raises ConfigError for sizes that do not fit together, and for speculation without multi-token prediction.
  """

  def __init__(
    self,
    model: ModelConfig,
    params: Params,
    buffers: Params,
    mesh: jax.sharding.Mesh,
    vocab: int,
    eos: int,
    config: EngineConfig,
    weights: str = "",
  ):
    check_engine(model, config)
    config = resolve_sizes(config)
    self.config, self.max_length, self._vocab, self._eos = config, config.max_length, vocab, eos
    self._mesh, self._shards = mesh, num_batch_shards(mesh)
    slots = -(-config.max_batch // self._shards)
    self._pages_per_sequence = -(-config.max_length // config.page_size)
    pages = -(-config.cache_tokens // (config.page_size * self._shards)) or slots * self._pages_per_sequence
    pages = max(pages, self._pages_per_sequence)
    pools = [PagePool(pages, config.page_size, weights) for _ in range(self._shards)]
    self._scheduler = Scheduler(slots, pools, config.chunk, config.is_static)
    self._slots, self._pages = slots * self._shards, pages * self._shards
    self._counts: collections.Counter[str] = collections.Counter()  # fields of EngineStats
    sampling_model = model.for_sampling()
    self._weights = params, buffers
    self._programs = prefill_program(sampling_model, vocab), decode_program(sampling_model, vocab)
    with jax.set_mesh(mesh):
      self._state = new_state(sampling_model, self._slots, self._pages, config.page_size, config.speculate)

  def warm_up(self) -> None:
    """Compiles both programs. Nothing compiles after that."""
    self._prefill([None] * self._shards)
    self._decode([])

  def add(self, request: Request) -> None:
    """Puts `request` into the queue. Raises ConfigError where it cannot be answered."""
    prompt, most = request.prompt, request.sampling.max_tokens
    if not prompt:
      raise ConfigError("the prompt has no tokens: expected at least one")
    if not 0 <= min(prompt) <= max(prompt) < self._vocab:
      raise ConfigError(
        f"the prompt has ids from {min(prompt)} to {max(prompt)}: expected 0 to {self._vocab - 1}, by the tokenizer of this model"
      )
    if len(prompt) + most > self.max_length:
      raise ConfigError(
        f"the prompt has {len(prompt):,} tokens and max_tokens is {most:,}: together more than the {self.max_length:,} of this "
        "model; shorten the prompt or lower max_tokens"
      )
    assert self._scheduler.find(request.id) is None, request.id
    self._scheduler.add(request)
    self._counts.update(prompt_tokens=len(prompt))

  def cancel(self, id: int) -> None:
    """Ends the request `id` and frees what it holds; nothing where it has ended."""
    if sequence := self._scheduler.find(id):
      self._scheduler.remove(sequence)
      self._counts.update(cancelled=1)

  @property
  def has_work(self) -> bool:
    """Whether a request has not ended."""
    return bool(self._scheduler.running or self._scheduler.waiting)

  def stats(self) -> EngineStats:
    """What the engine has done since it was made, and what it does now."""
    pools = self._scheduler.pools
    return EngineStats(
      **self._counts, compilations=count_compilations(), max_batch=self._slots, pages=self._pages,
      running=len(self._scheduler.running), waiting=len(self._scheduler.waiting), preemptions=self._scheduler.preemptions,
      free_pages=sum(pool.free for pool in pools), cached_pages=sum(pool.cached for pool in pools),
    )  # fmt: skip

  @property
  def cache_bytes(self) -> int:
    """Bytes of the key-value cache on all devices; replicas are not counted."""
    return sum(array.nbytes for array in jax.tree.leaves(self._state.cache))

  def step(self) -> list[Output]:
    """Computes chunks of prompts, then a token of each sequence whose prompt is computed, or two where its draft is right."""
    outputs: list[Output] = []
    may_admit, decoding = self._scheduler.may_admit(), sum(s.is_prefilled for s in self._scheduler.running)
    rounds = max(1, (self.config.token_budget - decoding) // (self.config.chunk * self._shards))
    while (rounds or self.config.is_static) and any(chunks := self._scheduler.next_chunks(may_admit)):
      outputs += self._prefill(chunks)
      rounds -= 1
    if sequences := list(self._scheduler.decoding()):
      outputs += self._decode(sequences)
    self._counts.update(steps=1)
    return outputs

  def _prefill(self, chunks: Sequence[scheduler.Sequence | None]) -> list[Output]:
    """Computes the next chunk of a sequence on each shard, and samples its first token if that was the last one."""
    new, rows = self._new_tokens(chunks, self.config.chunk), len(chunks)
    prompt, next_tokens = np.full((rows, self.max_length), -1, np.int32), np.zeros_like(new.tokens)
    is_last, wants_prompt = np.zeros(rows, bool), np.zeros(rows, bool)
    for row, sequence in enumerate(chunks):
      if sequence:
        end = self._scheduler.chunk_end(sequence)
        count = end - sequence.computed
        new.tokens[row, :count] = sequence.tokens[sequence.computed : end]
        after = sequence.request.prompt[sequence.computed + 1 : end + 1]
        next_tokens[row, : len(after)] = after
        new.length[row], is_last[row] = count, end == len(sequence.request.prompt)
        prompt[row, : len(sequence.request.prompt)] = sequence.request.prompt
        wants_prompt[row] = sequence.wants_prompt_logprobs
    slot = np.array([s.slot if s else 0 for s in chunks], np.int32)
    sampled = self._call(self._programs[0], new, Chunk(slot, prompt, is_last, wants_prompt, next_tokens))
    outputs: list[Output] = []
    for row, sequence in enumerate(chunks):
      if sequence:
        if wants_prompt[row]:
          sequence.prompt_logprobs += self._prompt_logprobs(sequence, sampled, row, int(new.length[row]))
        self._counts.update(prefilled_tokens=int(new.length[row]))
        self._scheduler.advance(sequence, sequence.computed + int(new.length[row]))
        if is_last[row]:
          sequence.is_prefilled = True
          outputs += self._answer(sequence, sampled, row, sequence.computed)
    return outputs

  def _decode(self, sequences: Sequence[scheduler.Sequence]) -> list[Output]:
    """Computes a token of each of `sequences`, and its draft, and samples what follows.

    That is its newest token, unless the sequence lost its pages. Then its answer is computed again token by token, as it
    was before, so that its bits do not depend on who took the pages.
    """
    by_slot: list[scheduler.Sequence | None] = [None] * self._slots
    for sequence in sequences:
      by_slot[sequence.shard * (self._slots // self._shards) + sequence.slot] = sequence
    new = self._new_tokens(by_slot, 1 + self.config.speculate)
    rows = [(row, sequence) for row, sequence in enumerate(by_slot) if sequence]
    for row, sequence in rows:
      tokens = sequence.tokens[sequence.computed :][: new.tokens.shape[1]]
      if sequence.draft is not None:
        tokens = [*tokens, sequence.draft]
        self._counts.update(drafted_tokens=1)
      new.tokens[row, : len(tokens)], new.length[row] = tokens, len(tokens)
    sampled = self._call(self._programs[1], new)
    outputs: list[Output] = []
    for row, sequence in rows:
      if sequence.draft is not None:
        self._counts.update(accepted_tokens=int(sampled.count[row]) - 1)
      outputs += self._answer(sequence, sampled, row, sequence.computed + 1)
    if sequences:
      self._counts.update(decode_steps=1, decoded_slots=len(sequences))
    return outputs

  def _new_tokens(self, rows: Sequence[scheduler.Sequence | None], new: int) -> NewTokens:
    """The NewTokens of a call, with room for `new` tokens a row; the caller fills in tokens and lengths."""
    start, table = np.zeros(len(rows), np.int32), np.zeros((len(rows), self._pages_per_sequence), np.int32)
    wants_logprobs = np.zeros(len(rows), bool)
    for row, sequence in enumerate(rows):
      if sequence:
        start[row] = sequence.computed
        table[row, : len(sequence.pages)] = sequence.pages
        wants_logprobs[row] = sequence.request.sampling.logprobs is not None
    tokens, length = np.zeros((len(rows), new), np.int32), np.zeros(len(rows), np.int32)
    rules = stack_rules([sequence.request.sampling if sequence else None for sequence in rows])
    return NewTokens(tokens, start, length, table, rules, wants_logprobs)

  def _call(self, program: Callable, new: NewTokens, *inputs: Chunk) -> Sampled:
    """What `program` samples, as NumPy arrays."""
    with jax.set_mesh(self._mesh):
      self._state, sampled = program(*self._weights, self._state, new, *inputs)
    wanted = [new.wants_logprobs.any(), bool(inputs) and inputs[0].wants_prompt_logprobs.any()]
    parts = sampled.tokens, sampled.count, sampled.draft
    logprobs = [
      part if wants else None for part, wants in zip((sampled.logprobs, sampled.prompt_logprobs), wanted, strict=True)
    ]
    return Sampled(*jax.device_get((*parts, *logprobs)))

  def _answer(self, sequence: scheduler.Sequence, sampled: Sampled, row: int, position: int) -> list[Output]:
    """Appends the tokens of a row of `sampled` to the answer, and ends the sequence at eos or max_tokens.

    position: of the first of them. Those that the answer has already, as it is computed again, are left out.
    """
    request, tokens, logprobs, reason = sequence.request, [], [], None
    known, count = len(sequence.tokens) - position, int(sampled.count[row])
    for i, token in list(enumerate(sampled.tokens[row, :count].tolist()))[known:]:
      if token == self._eos and not request.sampling.ignore_eos:
        reason = "stop"
        break
      sequence.tokens.append(token)
      tokens.append(token)
      if request.sampling.logprobs is not None:
        chosen, ids, values = (part[row, i] for part in sampled.logprobs)
        logprobs.append(TokenLogprobs(float(chosen), self._pairs(ids, values, request.sampling.logprobs)))
      if sequence.generated == request.sampling.max_tokens:
        reason = "length"
        break
    # All before these tokens is cached now, and of these tokens all but the newest.
    self._scheduler.advance(sequence, min(position + count - 1, len(sequence.tokens)))
    if known >= count:
      return []
    can_draft = self.config.speculate and sequence.generated + 1 < request.sampling.max_tokens
    sequence.draft = int(sampled.draft[row]) if can_draft else None
    prompt_logprobs = tuple(sequence.prompt_logprobs) if sequence.wants_prompt_logprobs else None
    is_first, sequence.has_answered, sequence.prompt_logprobs = not sequence.has_answered, True, []
    self._counts.update(generated_tokens=len(tokens), cached_prompt_tokens=sequence.cached_tokens * is_first)
    if reason:
      self._scheduler.remove(sequence)
      self._counts.update(finished=1)
    cached_tokens = sequence.cached_tokens if is_first else 0
    return [Output(request.id, tuple(tokens), tuple(logprobs), reason, prompt_logprobs, cached_tokens)]

  def _prompt_logprobs(
    self, sequence: scheduler.Sequence, sampled: Sampled, row: int, length: int
  ) -> list[TokenLogprobs | None]:
    """Log-probabilities of the prompt's tokens that the row's chunk predicts; before them None, for the first of all."""
    start, wanted = sequence.computed, sequence.request.sampling.prompt_logprobs or 0
    count = min(length, len(sequence.request.prompt) - start - 1)
    found: list[TokenLogprobs | None] = [None] if start == 0 else []
    for i in range(count):
      chosen, ids, values = (part[row, i] for part in sampled.prompt_logprobs)
      found.append(TokenLogprobs(float(chosen), self._pairs(ids, values, wanted)))
    return found

  def _pairs(self, ids: np.ndarray, values: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    """The first `count` (id, value), without the padding of the vocabulary, which comes last."""
    count = min(count, self._vocab)
    return tuple(zip(ids[:count].tolist(), values[:count].tolist(), strict=True))


def check_engine(model: ModelConfig, config: EngineConfig) -> None:
  """Raises ConfigError for sizes that do not fit together, and for speculation without multi-token prediction."""
  least = {"max_batch": 1, "max_length": 1, "page_size": 1, "cache_tokens": 0, "chunk": 0, "token_budget": 0}
  for name, limit in least.items():
    if getattr(config, name) < limit:
      raise ConfigError(f"{name}={getattr(config, name)}: expected at least {limit}")
  if 0 < config.cache_tokens < config.max_length:
    raise ConfigError(
      f"cache_tokens={config.cache_tokens:,} has no room for one sequence of max_length={config.max_length:,}: raise it, or "
      "lower max_length"
    )
  if config.speculate and not model.num_mtp_layers:
    raise ConfigError(
      "speculation needs a model with multi-token prediction (num_mtp_layers), and this one has none: leave it out"
    )


def resolve_sizes(config: EngineConfig) -> EngineConfig:
  """`config` with its chunk and token budget."""
  chunk = config.chunk or (32 if jax.default_backend() == "cpu" else 256)
  chunk = min(chunk, config.max_length)
  return dataclasses.replace(config, chunk=chunk, token_budget=config.token_budget or 4 * chunk)
