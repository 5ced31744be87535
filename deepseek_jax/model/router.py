"""Which experts a token goes to, and with what weight. Knows nothing of how tokens reach them."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model.linear import at_least_float32, normal_param
from deepseek_jax.model_config import ModelConfig, MoEConfig
from deepseek_jax.sharding import all_gather_params


class Buffer(nnx.Variable):
  """State of the model that no gradient trains."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
  """`indices` int32 and `weights` [batch, seq, experts per token]; `logits` and `scores` [batch, seq, experts].

  token_mask: as in BatchContext; where False the indices are the number of experts. overflow: [] int32, assignments that
  overflowed the expert buffer of their device.
  """

  indices: jax.Array
  weights: jax.Array
  logits: jax.Array
  scores: jax.Array
  token_mask: jax.Array | None = None
  overflow: jax.Array | int = 0


SCORES = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}
GROUP_SCORES = {
  "max": lambda scores: scores.max(-1),  # V2 section 2.2.2
  "top2_sum": lambda scores: jax.lax.top_k(scores, 2)[0].sum(-1),  # V3: K / M = 8 / 4; every implementation has the 2
}


def limit_to_groups(choice, config: MoEConfig):
  """`choice` [..., experts] with -inf outside each token's best `topk_groups` groups.

  Not 0, as some code has it: with biases all of `choice` may be negative, and then 0 wins.
  """
  grouped = choice.reshape(*choice.shape[:-1], config.num_expert_groups, -1)  # [..., groups, experts of a group]
  best = jax.lax.top_k(GROUP_SCORES[config.group_score](grouped), config.topk_groups)[1]  # [..., topk_groups]
  allowed = (best[..., None] == jnp.arange(config.num_expert_groups)).any(-2)  # [..., groups]
  return jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(choice.shape)


class Router(nnx.Module):
  """Affinities and the selection (MoE eq. 9 to 11, V2 section 2.2.2, V3 eq. 12 to 16); all in at least float32."""

  def __init__(self, config: ModelConfig, rngs):
    self.config = config.moe
    experts = config.moe.num_routed_experts
    self.kernel = normal_param((config.embed, experts), ("embed", None), config, rngs)
    if config.moe.router_bias:
      self.bias = Buffer(jnp.zeros((experts,), jnp.dtype(config.param_dtype)))

  def __call__(self, x) -> Routing:
    """Routing of `x` [batch, seq, embed]. Gradients flow through the chosen scores, not through the choice."""
    config, wide = self.config, at_least_float32(x.dtype)
    kernel = all_gather_params(self.kernel[...].astype(wide), "embed", None)
    # Stated here: in a bfloat16 model, chips would multiply these float32 operands in fewer bits.
    logits = jnp.einsum("bsd,de->bse", x.astype(wide), kernel, precision="highest")
    scores = SCORES[config.score](logits)  # [batch, seq, experts]
    choice = jax.lax.stop_gradient(scores)
    if config.router_bias:
      choice = choice + self.bias[...].astype(wide)  # V3 eq. 16: for the selection, not for the weight
    if config.num_expert_groups > 1:
      choice = limit_to_groups(choice, config)
    indices = jax.lax.top_k(choice, config.num_experts_per_token)[1]
    weights = jnp.take_along_axis(scores, indices, -1)  # [batch, seq, experts per token]
    if config.norm_topk_prob:
      weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)  # the 1e-20 is transformers'
    return Routing(indices, weights * config.route_scale, logits, scores)
