"""From logits to the next token."""

import jax
import jax.numpy as jnp

from deepseek_jax.config_sections import SampleConfig


def next_token(logits: jax.Array, token_in_text: jax.Array, key: jax.Array, config: SampleConfig) -> jax.Array:
  """Samples a token for each sequence.

  Args:
    logits: [batch, vocab] float; -inf for ids that must not be sampled.
    token_in_text: [batch, vocab] bool, ids already in the text, for `repetition_penalty` (Keskar et al. 2019, section
      4.1).
    key: PRNG key.
    config: temperature (0: greedy), top_k, top_p, repetition_penalty.

  Returns:
    [batch] int32.
  """
  penalized = jnp.where(logits > 0, logits / config.repetition_penalty, logits * config.repetition_penalty)
  # A penalty near 0 may divide into inf, of which there is no difference.
  limit = jnp.finfo(logits.dtype).max
  penalized = jnp.clip(penalized, -limit, limit)
  logits = jnp.where(token_in_text & (logits > -jnp.inf), penalized, logits)
  # Below the smallest normal number a temperature would be flushed to 0.
  if config.temperature < jnp.finfo(logits.dtype).tiny:
    return jnp.argmax(logits, -1).astype(jnp.int32)
  # Without the maximum, which would be inf at a small temperature and hide every difference.
  logits = (logits - logits.max(-1, keepdims=True)) / config.temperature
  logits = top_p(top_k(logits, config.top_k), config.top_p)
  return jax.random.categorical(key, logits).astype(jnp.int32)


def top_k(logits: jax.Array, k: int) -> jax.Array:
  """`logits` [batch, vocab] with all but the k largest of each row set to -inf; k = 0 keeps all.

  Of equal ones those with the lowest ids stay.
  """
  if k == 0 or k >= logits.shape[-1]:
    return logits
  return _keep_largest(logits, jax.lax.top_k(logits, k)[0][..., -1:], k)


def top_p(logits: jax.Array, p: float) -> jax.Array:
  """Nucleus sampling (Holtzman et al. 2020).

  `logits` [batch, vocab] with all tokens set to -inf but the fewest, likeliest ones that together have probability p; at
  least one stays. Of equally likely ones those with the lowest ids stay.
  """
  if p == 1:
    return logits
  descending = jnp.sort(logits, -1, descending=True)
  probabilities = jax.nn.softmax(descending)
  mass = jnp.cumsum(probabilities, -1)[..., :-1]  # of each but the last and all likelier ones
  count = 1 + jnp.sum(mass < p, -1, keepdims=True)
  return _keep_largest(logits, jnp.take_along_axis(descending, count - 1, -1), count)


def _keep_largest(logits: jax.Array, smallest: jax.Array, count: jax.Array | int) -> jax.Array:
  """`logits` with all but the `count` largest set to -inf, of which `smallest` is the last: of equal ones the first."""
  larger, equal = logits > smallest, logits == smallest
  room = count - jnp.sum(larger, -1, keepdims=True)
  return jnp.where(larger | (equal & (jnp.cumsum(equal, -1) <= room)), logits, -jnp.inf)
