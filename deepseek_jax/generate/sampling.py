"""From logits to the next tokens, each row by rules of its own."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.generate.request import MAX_TOP_LOGPROBS, Sampling

# field of SamplingRules -> dtype, in NumPy's and XLA's words
RULES = {
  "temperature": np.float32,
  "top_k": np.int32,
  "top_p": np.float32,
  "min_p": np.float32,
  "repetition_penalty": np.float32,
  "presence_penalty": np.float32,
  "frequency_penalty": np.float32,
  "seed": np.uint32,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRules:
  """The fields of `Sampling` of each row: arrays [rows], of NumPy or of XLA."""

  temperature: Any
  top_k: Any
  top_p: Any
  min_p: Any
  repetition_penalty: Any
  presence_penalty: Any
  frequency_penalty: Any
  seed: Any


GREEDY = Sampling(max_tokens=1, temperature=0.0)


def stack_rules(rows: Sequence[Sampling | None]) -> SamplingRules:
  """The rules of `rows` as NumPy arrays; None: greedy, for a row that nobody reads."""
  settings = [GREEDY if row is None else row for row in rows]
  return SamplingRules(**{name: np.array([getattr(s, name) for s in settings], dtype) for name, dtype in RULES.items()})


def sample_tokens(
  logits: jax.Array, rules: SamplingRules, counts: jax.Array, in_prompt: jax.Array, positions: jax.Array
) -> jax.Array:
  """Samples a token for each row: int32 [rows].

  What no row asks for costs nothing, and a row's token does not depend on the other rows.

  Args:
    logits: [rows, vocab] float; -inf for ids that must not be sampled.
    rules: of each row.
    counts: int [rows, vocab], how often each id was generated. in_prompt: bool [rows, vocab].
    positions: int [rows], of the token in its sequence. With the seed it is all that the random numbers depend on.
  """
  penalties = rules.repetition_penalty != 1, rules.presence_penalty != 0, rules.frequency_penalty != 0
  has_penalty = jnp.any(jnp.stack(penalties))
  logits = jax.lax.cond(has_penalty, penalize, lambda logits, *_: logits, logits, rules, counts, in_prompt)
  greedy = jnp.argmax(logits, -1).astype(jnp.int32)

  def random(logits):
    # Below the smallest normal number a temperature would be flushed to 0.
    is_greedy = rules.temperature < jnp.finfo(jnp.float32).tiny
    temperature = jnp.where(is_greedy, 1, rules.temperature)[:, None].astype(logits.dtype)
    # Without the maximum, which would be inf at a small temperature and hide every difference.
    scaled = (logits - logits.max(-1, keepdims=True)) / temperature
    is_cut = jnp.any((rules.top_k > 0) | (rules.top_p < 1))
    scaled = jax.lax.cond(is_cut, lambda x: top_p(top_k(x, rules.top_k), rules.top_p), lambda x: x, scaled)
    scaled = min_p(scaled, rules.min_p)
    keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(rules.seed, positions)
    return jnp.where(is_greedy, greedy, jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32))

  return jax.lax.cond(jnp.any(rules.temperature > 0), random, lambda _: greedy, logits)


def penalize(logits: jax.Array, rules: SamplingRules, counts: jax.Array, in_prompt: jax.Array) -> jax.Array:
  """`logits` [rows, vocab] after the repetition penalty (Keskar et al. 2019, section 4.1) and those of OpenAI's interface.

  Arguments as `sample_tokens`. Ids that must not be sampled stay so.
  """
  repetition, presence, frequency = (
    x[:, None].astype(logits.dtype) for x in (rules.repetition_penalty, rules.presence_penalty, rules.frequency_penalty)
  )
  penalized = jnp.where(logits > 0, logits / repetition, logits * repetition)
  penalized = jnp.where(in_prompt | (counts > 0), penalized, logits)
  penalized = penalized - presence * (counts > 0) - frequency * counts.astype(logits.dtype)
  # A penalty near 0 may divide into inf, of which there is no difference.
  limit = jnp.finfo(logits.dtype).max
  return jnp.where(logits > -jnp.inf, jnp.clip(penalized, -limit, limit), logits)


def top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
  """`logits` [rows, vocab] with all but the k [rows] largest of each row set to -inf; k = 0 keeps all.

  Of equal ones those with the lowest ids stay.
  """
  vocab = logits.shape[-1]
  count = jnp.where((k > 0) & (k < vocab), k, vocab)[:, None]
  return _keep_largest(logits, jnp.sort(logits, -1, descending=True), count)


def top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
  """Nucleus sampling (Holtzman et al. 2020).

  `logits` [rows, vocab] with all tokens set to -inf but the fewest, likeliest ones that together have probability p
  [rows]; at least one stays. Of equally likely ones those with the lowest ids stay.
  """
  descending = jnp.sort(logits, -1, descending=True)
  probabilities = jax.nn.softmax(descending)
  mass = jnp.cumsum(probabilities, -1)[..., :-1]  # of each but the last and all likelier ones
  count = 1 + jnp.sum(mass < p[:, None], -1, keepdims=True)
  return _keep_largest(logits, descending, jnp.where(p[:, None] < 1, count, logits.shape[-1]))


def min_p(logits: jax.Array, p: jax.Array) -> jax.Array:
  """`logits` [rows, vocab] with all tokens set to -inf that have less than p [rows] times the largest probability."""
  limit = logits.max(-1, keepdims=True) + jnp.log(p)[:, None].astype(logits.dtype)
  return jnp.where(logits >= limit, logits, -jnp.inf)


def _keep_largest(logits: jax.Array, descending: jax.Array, count: jax.Array) -> jax.Array:
  """`logits` with all but the `count` [rows, 1] largest set to -inf, of equal ones the first. descending: sorted."""
  smallest = jnp.take_along_axis(descending, count - 1, -1)
  larger, equal = logits > smallest, logits == smallest
  room = count - jnp.sum(larger, -1, keepdims=True)
  return jnp.where(larger | (equal & (jnp.cumsum(equal, -1) <= room)), logits, -jnp.inf)


def log_probabilities(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(ln p of `tokens` [...], ids and ln p of the likeliest [..., MAX_TOP_LOGPROBS] in descending order).

  Of a smaller vocabulary there are as many as it has. logits: [..., vocab]. tokens: int [...].
  """
  log_probs = jax.nn.log_softmax(logits)
  top, ids = jax.lax.top_k(log_probs, min(MAX_TOP_LOGPROBS, logits.shape[-1]))
  chosen = jnp.take_along_axis(log_probs, tokens[..., None], -1)[..., 0]
  return chosen, ids.astype(jnp.int32), top
