"""Continuing a prompt: the prompt in one pass, then one token at a time with a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from deepseek_jax.config_sections import SampleConfig
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.distributed import gather_to_host
from deepseek_jax.generate.sampling import next_token
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.sharding import UNSHARDED_SEQUENCE, axis_rules, num_batch_shards, psum, spec, spmd
from deepseek_jax.typing import Params


@functools.partial(jax.jit, static_argnames=("graphdef", "vocab", "eos", "config"))
def generate_tokens(
  graphdef: nnx.GraphDef,
  params: Params,
  buffers: Params,
  tokens: jax.Array,
  token_in_text: jax.Array,
  prompt_lengths: jax.Array,
  key_data: jax.Array,
  position: int | jax.Array,
  end: int | jax.Array,
  *,
  vocab: int,
  eos: int,
  config: SampleConfig,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """`generate_local_tokens` under `spmd`, on global arrays: each device generates for its part of the batch."""

  def local(params, buffers, *arguments):
    model = nnx.merge(graphdef, params, buffers)
    return generate_local_tokens(model, *arguments, vocab=vocab, eos=eos, config=config)

  param_specs, buffer_specs = (jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree) for tree in (params, buffers))
  by_batch, of_batch, replicated = spec("batch", None), spec("batch"), spec()
  in_specs = param_specs, buffer_specs, by_batch, by_batch, of_batch, by_batch, replicated, replicated
  out_specs = by_batch, by_batch, replicated, replicated
  with axis_rules(UNSHARDED_SEQUENCE):
    program = spmd(local, in_specs, out_specs, differentiable=False)
    return program(params, buffers, tokens, token_in_text, prompt_lengths, key_data, position, end)


def generate_local_tokens(
  model: Transformer,
  tokens: jax.Array,
  token_in_text: jax.Array,
  prompt_lengths: jax.Array,
  key_data: jax.Array,
  position: jax.Array,
  end: jax.Array,
  *,
  vocab: int,
  eos: int,
  config: SampleConfig,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Generates tokens from `position` up to `end`; stops early when every sequence has ended, with `eos`.

  One forward pass over the window makes the cache. Each token is then one step of `Transformer.decode`. Entries of the
  cache past `position` are overwritten before they are read. Where a prompt goes on past `position`, its own tokens are
  taken, so that prompts of several lengths share a batch.

  Args:
    tokens: [batch, window] int32, prompts, and what was generated after them up to `position`.
    token_in_text: [batch, padded vocab] bool, ids already in the text.
    prompt_lengths: [batch] int32.
    key_data: [batch, words] uint32, of the PRNG keys of the sampling. As key data, since devices of other processes take
      NumPy arrays only.
    position, end: [] int, with 0 < position < end <= window, and position at least the length of the shortest prompt.
    vocab: ids of the tokenizer; the padding of the vocabulary after them is never sampled.

  Returns:
    (tokens, token_in_text, position after the last token, whether every sequence has ended). A sequence that has ended
    goes on with `eos`.
  """

  def unfinished(carry):
    position, _, _, _, _, _, done = carry
    return (position < end) & ~done

  def step(carry):
    position, tokens, token_in_text, hidden, cache, ended, _ = carry
    logits = model.logits(hidden)[:, 0]  # [batch, padded vocab]
    ids = jnp.arange(logits.shape[1])
    sample = functools.partial(next_token, config=config)
    token = jax.vmap(sample)(
      jnp.where(ids < vocab, logits, -jnp.inf), token_in_text, jax.vmap(jax.random.fold_in, (0, None))(keys, position)
    )
    in_prompt = position < prompt_lengths
    in_place = jax.lax.dynamic_slice_in_dim(tokens, position, 1, 1)[:, 0]
    token = jnp.where(in_prompt, in_place, jnp.where(ended, eos, token))
    ended |= ~in_prompt & (token == eos)
    done = psum(jnp.sum(~ended), "batch") == 0
    token_in_text, token = token_in_text | (ids == token[:, None]), token[:, None]
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token, position, 1)
    hidden, cache = model.decode(token, cache, position)  # hidden [batch, 1, embed]
    return position + 1, tokens, token_in_text, hidden, cache, ended, done

  keys, index = jax.random.wrap_key_data(key_data), jnp.arange(tokens.shape[1])
  generated = (index >= prompt_lengths[:, None]) & (index < position)
  ended = jnp.any(generated & (tokens == eos), 1)
  hidden, cache = model.prefill(tokens)  # [batch, window, embed]
  hidden = jax.lax.dynamic_slice_in_dim(hidden, position - 1, 1, 1)  # of the last token
  carry = (position, tokens, token_in_text, hidden, cache, ended, jnp.array(False))
  position, tokens, token_in_text, _, _, _, done = jax.lax.while_loop(unfinished, step, carry)
  return tokens, token_in_text, position, done


def continue_prompt(
  graphdef: nnx.GraphDef,
  params: Params,
  buffers: Params,
  tokenizer: Tokenizer,
  config: SampleConfig,
  seq: int,
  seed: int,
  mesh: jax.sharding.Mesh,
  add_bos: bool = True,
) -> str:
  """Text that follows `config.prompt`: up to config.max_tokens tokens, or to the end of the document.

  Control characters other than newline and tab become the replacement character.

  Args:
    graphdef, params, buffers: the model.
    tokenizer: of the training data.
    seq: context length that the model was trained on. When it is full, the older half of the text is dropped.
    seed: of the sampling.
    mesh: the mesh that is set.
    add_bos: begin the prompt with `tokenizer.bos`, as documents begin in training. An empty one always begins so.
  """
  ids = tokenizer.encode(config.prompt)
  ids = [tokenizer.bos, *ids] if add_bos or not ids else ids
  prompt_length = len(ids)
  max_length = prompt_length + config.max_tokens
  batch = num_batch_shards(mesh)  # the same prompt on each shard of the batch, since a batch of one cannot be sharded
  window = min(seq, max_length)
  prompt_ids = np.zeros((batch, params["embed"].shape[0]), bool)
  prompt_ids[:, ids] = True
  by_batch, of_batch = NamedSharding(mesh, spec("batch", None)), NamedSharding(mesh, spec("batch"))
  token_in_text, done = jax.device_put(prompt_ids, by_batch), False
  while len(ids) < max_length and not done:
    context = ids if len(ids) < window else ids[-max(window // 2, 1) :]
    padded = np.zeros((batch, window), np.int32)
    padded[:, : len(context)] = context
    end = min(window, len(context) + max_length - len(ids))
    key = jax.random.fold_in(jax.random.key(seed), len(ids))
    lengths = jax.device_put(np.full(batch, len(context), np.int32), of_batch)
    key_data = jax.device_put(np.tile(jax.random.key_data(key), (batch, 1)), by_batch)
    tokens, token_in_text, position, done = generate_tokens(
      graphdef, params, buffers, jax.device_put(padded, by_batch), token_in_text, lengths, key_data, len(context), end,
      vocab=tokenizer.vocab, eos=tokenizer.eos, config=config,
    )  # fmt: skip
    ids += gather_to_host(tokens)[0, len(context) : int(position)].tolist()
  text = tokenizer.decode([token for token in ids[prompt_length:] if token != tokenizer.eos])
  # An untrained model may write a terminal's control sequences.
  return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
