"""Continuing many prompts of token ids, a batch at a time."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from deepseek_jax.config_sections import SampleConfig
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.distributed import gather_to_host
from deepseek_jax.generate.decoding import generate_tokens
from deepseek_jax.sharding import num_batch_shards, spec
from deepseek_jax.typing import Params

FIRST_TOKENS = 16  # generated before it is seen whether all have ended; twice as many each time after that


def continue_batch(
  graphdef: nnx.GraphDef,
  params: Params,
  buffers: Params,
  prompts: Sequence[Sequence[int]],
  seeds: Sequence[int],
  *,
  batch: int,
  window: int,
  tokenizer: Tokenizer,
  config: SampleConfig,
  mesh: jax.sharding.Mesh,
  has_ended: Callable[[list[int]], bool] = lambda ids: False,
) -> list[list[int]]:
  """Ids that follow each of `prompts`: up to config.max_tokens, or to eos, which is not among them.

  Args:
    graphdef, params, buffers: the model.
    prompts: at most `batch`, each of at least one id and at most window - config.max_tokens.
    seeds: of the sampling, one for each prompt.
    batch: sequences in a pass, a multiple of the shards of the batch.
    window: positions in a pass.
    tokenizer: of the model.
    config: the sampling; its prompt is not used.
    mesh: the mesh that is set.
    has_ended: whether no more ids are wanted after these; asked now and then.
  """
  assert batch % num_batch_shards(mesh) == 0 and len(prompts) <= batch
  rows = [*prompts, *[prompts[-1]] * (batch - len(prompts))]
  lengths = np.array([len(row) for row in rows], np.int32)
  tokens, in_text = np.zeros((batch, window), np.int32), np.zeros((batch, params["embed"].shape[0]), bool)
  for i, row in enumerate(rows):
    tokens[i, : len(row)] = row
    in_text[i, list(row)] = True
  by_batch, of_batch = NamedSharding(mesh, spec("batch", None)), NamedSharding(mesh, spec("batch"))
  keys = jax.vmap(jax.random.key)(np.array([*seeds, *[seeds[-1]] * (batch - len(seeds))], np.uint32))
  key_data = np.asarray(jax.random.key_data(keys))
  tokens_in_window, token_in_text, key_data = jax.device_put((tokens, in_text, key_data), by_batch)
  prompt_lengths = jax.device_put(lengths, of_batch)
  position, limit, more = int(lengths.min()), int(lengths.max()) + config.max_tokens, FIRST_TOKENS
  assert limit <= window
  done = False
  while not done:
    end = min(limit, max(position, int(lengths.max())) + more)
    tokens_in_window, token_in_text, reached, all_ended = generate_tokens(
      graphdef, params, buffers, tokens_in_window, token_in_text, prompt_lengths, key_data, position, end,
      vocab=tokenizer.vocab, eos=tokenizer.eos, config=config,
    )  # fmt: skip
    position, more, tokens = int(reached), 2 * more, gather_to_host(tokens_in_window)
    generated = [
      until_eos(tokens[i, length:position][: config.max_tokens].tolist(), tokenizer.eos)
      for i, length in enumerate(lengths[: len(prompts)])
    ]
    done = (
      bool(all_ended)
      or position >= limit
      or all(
        len(ids) < min(position - length, config.max_tokens) or len(ids) == config.max_tokens or has_ended(ids)
        for ids, length in zip(generated, lengths, strict=False)
      )
    )
  return generated


def until_eos(ids: list[int], eos: int) -> list[int]:
  """`ids` before the first `eos`."""
  return ids[: ids.index(eos)] if eos in ids else ids
