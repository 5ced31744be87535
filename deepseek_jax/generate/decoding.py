"""Continuing prompts with an engine of their own: texts for a run's sample, ids for an evaluation."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from deepseek_jax.config_sections import SampleConfig
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.generate.engine import Engine, EngineConfig
from deepseek_jax.generate.request import Request, Sampling
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.typing import Params

MIN_LENGTH = 16  # of a padded sequence


def padded_length(length: int, limit: int) -> int:
  """The power of two that `length` is padded to, at least MIN_LENGTH and at most `limit`: few shapes are compiled."""
  return min(max(MIN_LENGTH, 1 << (length - 1).bit_length()), limit)


def to_sampling(config: SampleConfig, seed: int, max_tokens: int | None = None) -> Sampling:
  """The Sampling of `config`, with another max_tokens if given."""
  return Sampling(
    config.max_tokens if max_tokens is None else max_tokens, config.temperature, config.top_k, config.top_p,
    repetition_penalty=config.repetition_penalty, seed=seed,
  )  # fmt: skip


def continue_ids(
  engine: Engine,
  prompts: Sequence[Sequence[int]],
  samplings: Sequence[Sampling],
  has_ended: Callable[[list[int]], bool] = lambda ids: False,
  update: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
  """Ids that follow each of `prompts`: up to max_tokens, or to eos, which is not among them.

  Args:
    engine: that has nothing else to do.
    samplings: of each prompt.
    has_ended: whether no more ids are wanted after these; asked whenever there are new ones.
    update: called with the number of prompts that are done.

  Raises ConfigError as `Engine.add`.
  """
  for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
    engine.add(Request(i, tuple(prompt), sampling))
  generated: list[list[int]] = [[] for _ in prompts]
  done = 0
  while engine.has_work:
    for output in engine.step():
      generated[output.id] += output.tokens
      if output.finish_reason is None and has_ended(generated[output.id]):
        engine.cancel(output.id)
      elif output.finish_reason is None:
        continue
      done += 1
      update(done)
  return generated


def continue_prompt(
  model: ModelConfig,
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
    model, params, buffers: as Engine takes them.
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
  window = min(seq, max_length)
  sizes = EngineConfig(max_batch=1, max_length=padded_length(window, seq))
  engine = Engine(model, params, buffers, mesh, tokenizer.vocab, tokenizer.eos, sizes)
  while len(ids) < max_length:
    context = ids if len(ids) < window else ids[-max(window // 2, 1) :]
    count = min(window - len(context), max_length - len(ids))
    # The random numbers of a position are another's once the text has moved.
    segment_seed = int(np.random.SeedSequence([seed % 2**64, len(ids)]).generate_state(1)[0])
    (new,) = continue_ids(engine, [context], [to_sampling(config, segment_seed, count)])
    ids += new
    if len(new) < count:  # the document has ended
      break
  text = tokenizer.decode(ids[prompt_length:])
  # An untrained model may write a terminal's control sequences.
  return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
