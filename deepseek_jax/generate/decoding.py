"""Continuing a prompt, one token at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from deepseek_jax.config import SampleConfig
from deepseek_jax.generate.sampling import next_token
from deepseek_jax.sharding import batch_parts, spec


@functools.partial(jax.jit, static_argnames=("graphdef", "window", "vocab", "eos", "config"))
def decode(graphdef, params, buffers, tokens, seen, position, key, *, window, vocab, eos, config: SampleConfig):
  """Fills `tokens` [batch, length] int32 from `position` on; returns it and the position that was reached.

  Each token is a forward pass over the `window` positions before it. `seen` [batch, vocab] marks ids already in the
  text; ids from `vocab` on never come. Ends when every row's newest token is `eos`, or when the rows are full.
  """
  model, length = nnx.merge(graphdef, params, buffers), tokens.shape[1]

  def unfinished(carry):
    position, _, _, done = carry
    return (position < length) & ~done

  def step(carry):
    position, tokens, seen, _ = carry
    start = jnp.maximum(position - window, 0)
    inputs = jax.lax.dynamic_slice_in_dim(tokens, start, window, 1)  # [batch, window]
    hidden = model(jax.reshard(inputs, spec("batch", "seq")))  # [batch, window, embed]
    last = jax.lax.dynamic_slice_in_dim(hidden, position - 1 - start, 1, 1)
    logits = jax.reshard(model.logits(last)[:, 0], spec(None, None))  # [batch, vocab]
    ids = jnp.arange(logits.shape[1])
    token = next_token(jnp.where(ids < vocab, logits, -jnp.inf), seen, jax.random.fold_in(key, position), config)
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], position, 1)
    return position + 1, tokens, seen | (ids == token[:, None]), jnp.all(token == eos)

  position, tokens, _, _ = jax.lax.while_loop(unfinished, step, (position, tokens, seen, jnp.array(False)))
  return tokens, position


def continue_prompt(graphdef, params, buffers, tokenizer, config: SampleConfig, seq, seed, mesh) -> str:
  """Text that follows `config.prompt`: up to config.max_tokens tokens, or to the end of the document.

  Control characters other than newline and tab come out as the replacement character.

  Args:
    graphdef, params, buffers: the model. tokenizer: of the training data.
    seq: positions that the model was trained on; older ones are forgotten. seed: of the sampling. mesh: the one set.
  """
  ids = [tokenizer.bos, *tokenizer.encode(config.prompt)]
  rows = batch_parts(mesh)  # the same prompt on each shard of the batch: a batch of one divides over no mesh
  tokens = np.zeros((rows, len(ids) + config.max_tokens), np.int32)
  tokens[:, : len(ids)] = ids
  seen = np.zeros((rows, params["embed"].shape[0]), bool)
  seen[:, ids] = True
  replicated = NamedSharding(mesh, spec(None, None))
  tokens, position = decode(
    graphdef, params, buffers, jax.device_put(tokens, replicated), jax.device_put(seen, replicated),
    len(ids), jax.random.key(seed),
    window=min(seq, tokens.shape[1]), vocab=tokenizer.vocab, eos=tokenizer.eos, config=config,
  )  # fmt: skip
  new = np.asarray(tokens)[0, len(ids) : int(position)]
  text = tokenizer.decode(new[new != tokenizer.eos].tolist())
  # What a young model writes could be a terminal's control sequences.
  return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
