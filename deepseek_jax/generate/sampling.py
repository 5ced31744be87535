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
  logits = jnp.where(token_in_text, penalized, logits)
  if config.temperature == 0:
    return jnp.argmax(logits, -1).astype(jnp.int32)
  logits = top_p(top_k(logits / config.temperature, config.top_k), config.top_p)
  return jax.random.categorical(key, logits).astype(jnp.int32)


def top_k(logits: jax.Array, k: int) -> jax.Array:
  """`logits` [batch, vocab] with all but the k largest of each row set to -inf; k = 0 keeps all."""
  if k == 0 or k >= logits.shape[-1]:
    return logits
  threshold = jax.lax.top_k(logits, k)[0][..., -1:]
  return jnp.where(logits < threshold, -jnp.inf, logits)


def top_p(logits: jax.Array, p: float) -> jax.Array:
  """Nucleus sampling (Holtzman et al. 2020).

  `logits` [batch, vocab] with all tokens set to -inf but the likeliest ones that together have probability p.
  """
  if p == 1:
    return logits
  descending = jnp.sort(logits, -1, descending=True)
  probabilities = jax.nn.softmax(descending)
  before = jnp.cumsum(probabilities, -1) - probabilities  # mass of all likelier tokens
  threshold = jnp.where(before < p, descending, jnp.inf).min(-1, keepdims=True)
  return jnp.where(logits < threshold, -jnp.inf, logits)
