"""The two compiled programs of an engine: a chunk of prompts, and the next tokens of all sequences.

Their shapes are those of the engine, whatever is asked for, so that nothing compiles once both have run. Each row of a
program is computed from its own tokens and pages alone.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.generate.sampling import SamplingRules, log_probabilities, sample_tokens
from deepseek_jax.model.attention_kinds import ATTENTION
from deepseek_jax.model.decode import decode, decode_mtp
from deepseek_jax.model.paged_cache import CacheArrays, CachePositions, zeros
from deepseek_jax.model.transformer import STACKS, Transformer, graphdef
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.sharding import UNSHARDED_SEQUENCE, all_gather, axis_index, axis_rules, axis_size, pmax, spec, spmd

MTP = "mtp_layers"
Array = Any  # of NumPy where a call is made, of XLA inside


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
  """What stays on the devices between two calls; each call takes it and gives it back changed, in the same memory.

  Attributes:
    cache: of each stack of layers, and of multi-token prediction with speculation. Pages are sharded as the batch.
    counts: int32 [slots, vocab], how often the answer of each slot has each id.
    in_prompt: bool [slots, vocab], ids of its prompt.
  """

  cache: dict[str, CacheArrays]
  counts: jax.Array
  in_prompt: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NewTokens:
  """The tokens of a call, of all shards of the batch. NumPy arrays, the same on all processes; rows are those of slots or chunks.

  Attributes:
    tokens: int32 [rows, new]. In decoding: the newest token, then a draft, if there is one.
    start: int32 [rows], as in CachePositions.
    length: int32 [rows], as there.
    table: int32 [rows, pages of a sequence], as there. Page numbers count within the shard of the row.
    rules: of each row.
    wants_logprobs: bool [rows].
  """

  tokens: Array
  start: Array
  length: Array
  table: Array
  rules: SamplingRules
  wants_logprobs: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
  """What a chunk of prompts has beside its NewTokens; NumPy arrays, a row for each shard of the batch.

  Attributes:
    slot: int32 [rows], the slot of the prompt, counted within its shard.
    prompt: int32 [rows, max_length], all of it, padded with -1.
    is_last: bool [rows], whether the next token is to be sampled.
    wants_prompt_logprobs: bool [rows].
    next_tokens: int32 [rows, new], the token after each of the chunk's; that after the prompt is not known yet.
  """

  slot: Array
  prompt: Array
  is_last: Array
  wants_prompt_logprobs: Array
  next_tokens: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
  """What a call gives, replicated on all devices.

  Attributes:
    tokens: int32 [rows, n], with n = 1 for chunks, else as many as new tokens went in.
    count: int32 [rows], of `tokens` those that count: 2 where the draft was right.
    draft: int32 [rows], of the token after those; 0 without speculation.
    logprobs: (of `tokens` [rows, n], ids and values of the likeliest [rows, n, MAX_TOP_LOGPROBS]); zeros if no row wants any.
    prompt_logprobs: the same of the chunk's next_tokens [rows, new]; None in decoding.
  """

  tokens: Array
  count: Array
  draft: Array
  logprobs: Any
  prompt_logprobs: Any = None


def new_state(config: ModelConfig, slots: int, pages: int, page_size: int, speculate: bool) -> DecodeState:
  """An empty state on the mesh that is set. slots, pages: of all shards of the batch together."""
  layers = {name: getattr(config, f"num_{name}") for name in STACKS} | {MTP: int(speculate)}
  shapes, dtype = ATTENTION[config.attention.kind].token_shapes(config.attention), config.compute_dtype
  cache = {name: zeros(shapes, n, pages, page_size, dtype) for name, n in layers.items() if n}
  return DecodeState(cache, *_no_counts(slots, config.vocab))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _no_counts(slots: int, vocab: int) -> tuple[jax.Array, jax.Array]:
  sharding = spec("batch", None)
  return tuple(jnp.zeros((slots, vocab), dtype, out_sharding=sharding) for dtype in (jnp.int32, bool))  # type: ignore[return-value]


@functools.cache
def prefill_program(model: ModelConfig, vocab: int) -> Callable[..., tuple[DecodeState, Sampled]]:
  """(params, buffers, state, NewTokens, Chunk) -> (state, Sampled): the next chunk of a prompt on each shard of the batch.

  It samples a token where the chunk is the last one. The state is donated.

  Args:
    model: `for_sampling`.
    vocab: ids of the tokenizer; the padding of the vocabulary after them is never sampled.
  """
  return _compile(_prefill_local, model, vocab)


@functools.cache
def decode_program(model: ModelConfig, vocab: int) -> Callable[..., tuple[DecodeState, Sampled]]:
  """(params, buffers, state, NewTokens) -> (state, Sampled): the next token of each slot, or two where its draft was right.

  Arguments as `prefill_program`.
  """
  return _compile(_decode_local, model, vocab)


def _compile(local: Callable[..., tuple[DecodeState, Sampled]], model: ModelConfig, vocab: int) -> Callable:
  """`local` under `spmd` and jit: each device has its part of the slots, of the pages and of the rows of the inputs."""

  def local_program(static, params, buffers, state, inputs):
    def own_rows(x):
      rows = x.shape[0] // axis_size("batch")
      return jax.lax.dynamic_slice_in_dim(x, axis_index("batch") * rows, rows)

    transformer = nnx.merge(static, params, buffers)
    state, sampled = local(transformer, state, *jax.tree.map(own_rows, inputs), vocab=vocab)
    return state, jax.tree.map(lambda x: all_gather(x, "batch", 0), sampled)

  def program(params, buffers, state, *inputs):
    on_device = functools.partial(local_program, graphdef(model))
    specs = [jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree) for tree in (params, buffers, state)]
    in_specs = (*specs, jax.tree.map(lambda x: spec(), inputs))
    with axis_rules(UNSHARDED_SEQUENCE):
      return spmd(on_device, in_specs, (specs[2], spec()), differentiable=False)(params, buffers, state, inputs)

  return jax.jit(program, donate_argnums=2)


def _prefill_local(
  model: Transformer, state: DecodeState, new: NewTokens, chunk: Chunk, *, vocab: int
) -> tuple[DecodeState, Sampled]:
  """`prefill_program` on one device."""
  where = CachePositions(new.start, new.length, new.table)
  hidden, cache = decode(model, new.tokens, state.cache, where)  # [rows, new, embed]
  last = jnp.maximum(new.length - 1, 0)
  logits = _logits(model, jnp.take_along_axis(hidden, last[:, None, None], 1), vocab)  # [rows, 1, vocab]
  in_prompt = _tokens_of(chunk.prompt, logits.shape[-1])
  counts = jnp.zeros(in_prompt.shape, jnp.int32)
  tokens = sample_tokens(logits[:, 0], new.rules, counts, in_prompt, new.start + new.length)[:, None]
  logprobs = _if_any(new.wants_logprobs, lambda: log_probabilities(logits, tokens))
  prompt_logprobs = _if_any(
    chunk.wants_prompt_logprobs, lambda: log_probabilities(_logits(model, hidden, vocab), chunk.next_tokens)
  )
  counts = counts.at[jnp.arange(len(tokens)), tokens[:, 0]].add(chunk.is_last)
  slots = jnp.where(new.length > 0, chunk.slot, state.counts.shape[0])  # out of range: dropped
  counts, in_prompt = (
    state.counts.at[slots].set(counts, mode="drop"),
    state.in_prompt.at[slots].set(in_prompt, mode="drop"),
  )
  is_end = chunk.is_last[:, None] & (jnp.arange(new.tokens.shape[1]) == last[:, None])
  cache, draft = _draft(model, hidden, jnp.where(is_end, tokens, chunk.next_tokens), cache, where, vocab)
  sampled = Sampled(tokens, chunk.is_last.astype(jnp.int32), draft, logprobs, prompt_logprobs)
  return DecodeState(cache, counts, in_prompt), sampled


def _decode_local(model: Transformer, state: DecodeState, new: NewTokens, *, vocab: int) -> tuple[DecodeState, Sampled]:
  """`decode_program` on one device.

  A draft is right if it is what the model samples in its place. Then the logits after it hold, and give a token more.
  So the tokens are those without speculation.
  """
  where = CachePositions(new.start, new.length, new.table)
  hidden, cache = decode(model, new.tokens, state.cache, where)  # [slots, new, embed]
  logits, counts = _logits(model, hidden, vocab), state.counts
  is_right = new.length > 0
  sampled_tokens: list[jax.Array] = []
  count = jnp.zeros_like(new.length)
  for i in range(new.tokens.shape[1]):
    if i:
      is_right &= (sampled_tokens[-1] == new.tokens[:, i]) & (new.length > i)
    token = sample_tokens(logits[:, i], new.rules, counts, state.in_prompt, new.start + i + 1)
    counts = counts.at[jnp.arange(len(token)), token].add(is_right)
    count += is_right
    sampled_tokens.append(token)
  tokens = jnp.stack(sampled_tokens, 1)
  logprobs = _if_any(new.wants_logprobs, lambda: log_probabilities(logits, tokens))
  cache, draft = _draft(model, hidden, tokens, cache, dataclasses.replace(where, length=count), vocab)
  return DecodeState(cache, counts, state.in_prompt), Sampled(tokens, count, draft, logprobs)


def _logits(model: Transformer, hidden: jax.Array, vocab: int) -> jax.Array:
  """Logits [rows, new, padded vocab]; -inf for the padding of the vocabulary."""
  logits = model.logits(hidden)
  return jnp.where(jnp.arange(logits.shape[-1]) < vocab, logits, -jnp.inf)


def _draft(
  model: Transformer,
  hidden: jax.Array,
  next_tokens: jax.Array,
  cache: dict[str, CacheArrays],
  where: CachePositions,
  vocab: int,
) -> tuple[dict[str, CacheArrays], jax.Array]:
  """(cache, the likeliest token after the last of `next_tokens` by multi-token prediction, int32 [rows]).

  hidden: [rows, new, embed]. next_tokens: int [rows, new], the tokens one position later. where: of `hidden`.
  """
  if MTP not in cache:
    return cache, jnp.zeros(hidden.shape[0], jnp.int32)
  # A page of a prefix cache has in its last position what came next when it was made, which may differ here: that costs
  # a good draft, and no token depends on it.
  hidden, arrays = decode_mtp(model, hidden, next_tokens, cache[MTP], where)
  last = jnp.maximum(where.length - 1, 0)[:, None, None]
  logits = _logits(model, jnp.take_along_axis(hidden, last, 1), vocab)
  return cache | {MTP: arrays}, jnp.argmax(logits[:, 0], -1).astype(jnp.int32)


def _tokens_of(prompt: jax.Array, vocab: int) -> jax.Array:
  """bool [rows, vocab], which ids `prompt` int [rows, length] has; padding, -1, is none."""
  rows, ids = jnp.arange(prompt.shape[0])[:, None], jnp.where(prompt >= 0, prompt, vocab)
  return jnp.zeros((prompt.shape[0], vocab), bool).at[rows, ids].set(True, mode="drop")


def _if_any(wants: jax.Array, compute: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What `compute` gives if a row wants it, else zeros."""
  shapes = jax.eval_shape(compute)
  # All devices choose alike: `compute` may communicate.
  any_wants = pmax(jnp.any(wants).astype(jnp.int32), "batch") > 0
  return jax.lax.cond(any_wants, compute, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
