"""What routers share: which experts a token goes to, and with what weight. Knows nothing of how tokens reach them.

`router_kinds.py` has the table of routers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model.batch_context import BatchContext
from deepseek_jax.model.linear import at_least_float32, normal_param
from deepseek_jax.model_config import ModelConfig, MoEConfig
from deepseek_jax.sharding import all_gather_params


class RouterBias(nnx.Variable):
  """[experts], what a router balances experts by: V3's bias of the scores, or a threshold. It has no gradient.

  The rule of `balance.bias_rule` (`training.router_bias`) moves every RouterBias of the model after each update. A
  router has one where `model.moe.router_bias` says so. A buffer that no rule moves is of another subclass of Variable.
  """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
  """What the router chose, and how many assignments overflowed. Observations read it (`layer_aux.observe_routing`).

  An index equal to the number of experts is no assignment: here, in expert parallelism and in dispatch, there with the
  number of experts of the device.
  """

  indices: jax.Array  # int32 [batch, seq, experts per token]; no assignments where `token_mask` is False
  weights: jax.Array  # [batch, seq, experts per token]
  logits: jax.Array  # [batch, seq, experts]
  scores: jax.Array  # [batch, seq, experts]
  token_mask: jax.Array | None = None  # as in BatchContext
  overflow: jax.Array | int = 0  # [] int32, assignments that overflowed the expert buffer of this device


# Affinities [..., experts] of logits [..., experts], by model.moe.score.
SCORES = {
  "softmax": jax.nn.softmax,  # DeepSeekMoE eq. 5, V2 eq. 22
  "sigmoid": jax.nn.sigmoid,  # V3 eq. 15
}
# Scores [..., groups] of affinities [..., groups, experts of a group], by model.moe.group_score. V3's is the sum of the
# best K / M = 8 / 4 experts; every implementation has the 2 fixed.
GROUP_SCORES = {
  "max": lambda scores: scores.max(-1),  # V2 section 2.2.2
  "top2_sum": lambda scores: jax.lax.top_k(scores, 2)[0].sum(-1),  # V3 section 2.1.2
}


def limit_to_groups(scores: jax.Array, config: MoEConfig) -> jax.Array:
  """`scores` [..., experts] with -inf outside each token's best `topk_groups` groups.

  Not 0, as some code has it: with biases all scores may be negative, and then 0 wins.
  """
  grouped = scores.reshape(*scores.shape[:-1], config.num_expert_groups, -1)  # [..., groups, experts of a group]
  best = jax.lax.top_k(GROUP_SCORES[config.group_score](grouped), config.topk_groups)[1]  # [..., topk_groups]
  allowed = (best[..., None] == jnp.arange(config.num_expert_groups)).any(-2)  # [..., groups]
  return jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(scores.shape)


class Router(nnx.Module):
  """Affinities and top-k (DeepSeekMoE eq. 9 to 11, V2 section 2.2.2, V3 eq. 12 to 16), in at least float32."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None):
    self.config = config.moe
    experts = config.moe.num_routed_experts
    self.kernel = normal_param((config.embed, experts), ("embed", None), config, rngs)
    if config.moe.router_bias:
      self.bias = RouterBias(jnp.zeros((experts,), jnp.dtype(config.param_dtype)))

  def __call__(self, x: jax.Array, batch_context: BatchContext) -> Routing:
    """Routing of `x` [batch, seq, embed], whatever else `batch_context` says of the tokens. Gradients flow through the chosen scores, not through the choice."""
    config, dtype = self.config, at_least_float32(x.dtype)
    kernel = all_gather_params(self.kernel[...].astype(dtype), "embed", None)
    # Explicit precision: in a bfloat16 model, TPUs and GPUs would multiply these float32 operands in fewer bits.
    logits = jnp.einsum("bsd,de->bse", x.astype(dtype), kernel, precision="highest")
    scores = SCORES[config.score](logits)  # [batch, seq, experts]
    indices = self.choose(scores, batch_context)
    weights = jnp.take_along_axis(scores, indices, -1)  # [batch, seq, experts per token]
    if config.norm_topk_prob:
      weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)  # the 1e-20 is transformers'
    return Routing(indices, weights * config.route_scale, logits, scores)

  def choose(self, scores: jax.Array, batch_context: BatchContext) -> jax.Array:
    """The chosen experts, int32 [batch, seq, experts per token], of `scores` [batch, seq, experts]: the highest."""
    config, selection = self.config, jax.lax.stop_gradient(scores)
    if config.router_bias:
      selection = selection + self.bias[...].astype(scores.dtype)  # V3 eq. 16: for the selection, not for the weight
    if config.num_expert_groups > 1:
      selection = limit_to_groups(selection, config)
    return jax.lax.top_k(selection, config.num_experts_per_token)[1]
