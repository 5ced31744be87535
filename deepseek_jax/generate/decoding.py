"""Continuing a prompt: the prompt in one pass, then one token at a time with a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from deepseek_jax.config import SampleConfig
from deepseek_jax.distributed import to_host
from deepseek_jax.generate.sampling import next_token
from deepseek_jax.sharding import UNSHARDED_SEQUENCE, num_batch_shards, psum, rules, spec, spmd


@functools.partial(jax.jit, static_argnames=("graphdef", "vocab", "eos", "config"))
def decode(graphdef, params, buffers, *arguments, vocab, eos, config: SampleConfig):
  """`decode_rows(model, *arguments)` on every device, of the rows that each has, with what it returns whole again."""

  def local(params, buffers, *arguments):
    model = nnx.merge(graphdef, params, buffers)
    return decode_rows(model, *arguments, vocab=vocab, eos=eos, config=config)

  layouts = [jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree) for tree in (params, buffers)]
  rows, shared = spec("batch", None), spec()
  with rules(UNSHARDED_SEQUENCE):
    outputs = rows, rows, shared, shared
    run = spmd(local, (*layouts, rows, rows, shared, shared, shared), outputs, differentiable=False)
    return run(params, buffers, *arguments)


def decode_rows(model, tokens, seen, position, stop, key, *, vocab, eos, config: SampleConfig):
  """Fills `tokens` [batch, window] int32 from `position` up to `stop`, at most window.

  One forward pass over the window makes the cache (what it holds past `position` is overwritten before it is seen); each
  token is then one step of `Transformer.decode`. `seen` [batch, vocab] marks ids already in the text; ids from `vocab` on
  never come. Ends early when every row's newest token is `eos`.

  Returns:
    (tokens, seen, the position that was reached, whether every row has ended).
  """

  def unfinished(carry):
    position, _, _, _, _, done = carry
    return (position < stop) & ~done

  def step(carry):
    position, tokens, seen, last, cache, _ = carry
    logits = model.logits(last)[:, 0]  # [batch, vocab]
    ids = jnp.arange(logits.shape[1])
    token = next_token(jnp.where(ids < vocab, logits, -jnp.inf), seen, jax.random.fold_in(key, position), config)
    done = psum(jnp.sum(token != eos), "batch") == 0
    seen, token = seen | (ids == token[:, None]), token[:, None]
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token, position, 1)
    last, cache = model.decode(token, cache, position)  # last [batch, 1, embed]
    return position + 1, tokens, seen, last, cache, done

  hidden, cache = model.prefill(tokens)  # [batch, window, embed]
  last = jax.lax.dynamic_slice_in_dim(hidden, position - 1, 1, 1)
  carry = (position, tokens, seen, last, cache, jnp.array(False))
  position, tokens, seen, _, _, done = jax.lax.while_loop(unfinished, step, carry)
  return tokens, seen, position, done


def continue_prompt(graphdef, params, buffers, tokenizer, config: SampleConfig, seq, seed, mesh) -> str:
  """Text that follows `config.prompt`: up to config.max_tokens tokens, or to the end of the document.

  Control characters other than newline and tab come out as the replacement character.

  Args:
    graphdef, params, buffers: the model. tokenizer: of the training data.
    seq: positions that the model was trained on. When they are full the older half of the text is forgotten.
    seed: of the sampling. mesh: the one set.
  """
  ids = [tokenizer.bos, *tokenizer.encode(config.prompt)]
  prompt, end = len(ids), len(ids) + config.max_tokens
  rows = num_batch_shards(mesh)  # the same prompt on each shard of the batch: a batch of one divides over no mesh
  window = min(seq, end)
  seen = np.zeros((rows, params["embed"].shape[0]), bool)
  seen[:, ids] = True
  by_row = NamedSharding(mesh, spec("batch", None))
  seen, done = jax.device_put(seen, by_row), False
  while len(ids) < end and not done:
    context = ids if len(ids) < window else ids[-max(window // 2, 1) :]
    tokens = np.zeros((rows, window), np.int32)
    tokens[:, : len(context)] = context
    stop = min(window, len(context) + end - len(ids))
    tokens, seen, position, done = decode(
      graphdef, params, buffers, jax.device_put(tokens, by_row), seen, len(context), stop,
      jax.random.fold_in(jax.random.key(seed), len(ids)), vocab=tokenizer.vocab, eos=tokenizer.eos, config=config,
    )  # fmt: skip
    ids += to_host(tokens)[0, len(context) : int(position)].tolist()
  text = tokenizer.decode([token for token in ids[prompt:] if token != tokenizer.eos])
  # What a young model writes could be a terminal's control sequences.
  return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
