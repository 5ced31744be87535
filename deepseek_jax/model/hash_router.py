"""The router that chooses experts by token ids."""

import math

import jax
import jax.numpy as jnp

from deepseek_jax.model.batch_context import BatchContext
from deepseek_jax.model.router import Router


def hash_experts(token_ids: jax.Array, num_experts: int, num_experts_per_token: int) -> jax.Array:
  """Experts int32 [..., experts per token] of `token_ids` int [...], which must be at least 0. Fixed: no parameter, no seed.

  Expert j of token t is (t + j * step) mod E. All tokens of a block of E consecutive ids share a step, which has no
  divisor in common with E. So a token's experts differ from one another, and each block gives every expert the same
  number of tokens: loads over a vocabulary are even (Roller et al.: balanced assignment). Blocks cycle through the
  steps up to E / 2, since E - step makes the same sets. The first is next to the golden section of E, whose multiples
  lie far apart: neighbouring ids, as the first ones of a BPE vocabulary, which are frequent, share few experts.
  """
  golden = num_experts * (3 - math.sqrt(5)) / 2
  coprime = [step for step in range(1, num_experts // 2 + 1) if math.gcd(step, num_experts) == 1] or [1]
  steps = jnp.asarray(sorted(coprime, key=lambda step: abs(step - golden)), jnp.int32)
  token_ids = token_ids.astype(jnp.int32)[..., None]
  step = steps[token_ids // num_experts % len(coprime)]
  return (token_ids % num_experts + step * jnp.arange(num_experts_per_token, dtype=jnp.int32)) % num_experts


class HashRouter(Router):
  """Experts by the token's id (Hash Layers, Roller et al., arXiv:2106.04426), their weights by the learned scores.

  DeepSeek-V4 routes like this in its first three MoE layers, by a table of its own for each layer. Here all layers
  have the same `hash_experts`.
  """

  def choose(self, scores: jax.Array, batch_context: BatchContext) -> jax.Array:
    """The experts of the token ids alone, int32 [batch, seq, experts per token]."""
    return hash_experts(batch_context.token_ids, self.config.num_routed_experts, self.config.num_experts_per_token)
