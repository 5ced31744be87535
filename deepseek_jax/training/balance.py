"""Load balancing of experts: the papers' balance losses, and the metrics to watch. `router_bias.py` has V3's bias.

Losses are per sequence (as in V2's released code and V3 eq. 17 to 20), so that neither microbatches nor the mesh change
them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config_sections import BalanceConfig
from deepseek_jax.model.router import Routing
from deepseek_jax.model.transformer import layer_names
from deepseek_jax.model_config import ModelConfig, MoEConfig
from deepseek_jax.sharding import psum


def expert_counts(indices: jax.Array, experts: int) -> jax.Array:
  """[batch, experts] int32: how many tokens of each full sequence chose each expert.

  indices: [batch, seq, experts per token] int, of the positions that this device has.
  """
  return psum((indices[..., None] == jnp.arange(experts)).sum((1, 2), dtype=jnp.int32), "seq")


def balance_loss(routing: Routing, counts: jax.Array, moe: MoEConfig, balance: BalanceConfig) -> jax.Array:
  """[batch]: the weighted sum of the losses of `balance`, each of a full sequence.

  f and P are those of V3 eq. 17 to 20. f counts the chosen experts, as published implementations do. V3 eq. 18 counts
  those with the highest scores without bias.

  counts: [batch, experts], of `expert_counts`.
  """
  token_mask = routing.token_mask
  if token_mask is None:
    token_mask = jnp.ones((1, routing.indices.shape[1]), bool)
  token_mask = token_mask.astype(routing.scores.dtype)  # [batch or 1, seq]
  tokens = psum(token_mask.sum(1, keepdims=True), "seq")  # [batch or 1, 1]

  def mean(x):
    """Mean of `x` [batch, seq, ...] over the tokens of each full sequence."""
    weight = token_mask.reshape(*token_mask.shape, *(1,) * (x.ndim - 2))
    return psum((x * weight).sum(1), "seq") / tokens.reshape(-1, *(1,) * (x.ndim - 2))

  scores = routing.scores / routing.scores.sum(-1, keepdims=True)  # V3 eq. 19; a softmax has this sum already
  p = mean(scores)  # [batch, experts]
  f = counts * (moe.num_routed_experts / (moe.num_experts_per_token * tokens))
  loss = balance.expert_loss * (f * p).sum(-1)
  if balance.device_loss or balance.communication_loss:
    groups = balance.device_groups or moe.num_expert_groups
    device_p = p.reshape(p.shape[0], groups, -1).sum(-1)  # [batch, groups]
  if balance.device_loss:
    loss += balance.device_loss * (f.reshape(device_p.shape + (-1,)).mean(-1) * device_p).sum(-1)
  if balance.communication_loss:
    device = routing.indices // (moe.num_routed_experts // groups)
    sent_to = (device[..., None] == jnp.arange(groups)).any(2)  # [batch, seq, groups]: a token counts once a device
    loss += balance.communication_loss * (groups / moe.topk_groups * mean(sent_to) * device_p).sum(-1)
  if balance.router_z_loss:
    loss += balance.router_z_loss * mean(jnp.square(jax.nn.logsumexp(routing.logits, -1)))
  return loss


def load_metrics(
  model: ModelConfig, load: dict[str, np.ndarray]
) -> tuple[dict[str, float | int], dict[str, np.ndarray]]:
  """What is logged of `load`, {stack: [layers, experts] int}, the assignments of a step, of any stacks of the model.

  Returns:
    ({name: scalar}, {name: [experts] fraction of the layer's assignments}). The scalars of each layer, `layer_names`:
      max_vio: max / mean - 1 (0: balanced; Wang et al. 2024, arXiv:2408.15664).
      entropy: of the fractions, divided by its maximum (1: balanced).
      dead_experts: experts that no token chose.
  """
  names = layer_names(model)
  scalars: dict[str, float | int] = {}
  fractions = {}
  for stack, stack_load in load.items():
    for name, layer_load in zip(names[stack], np.asarray(stack_load, np.float64), strict=True):
      fraction = layer_load / layer_load.sum()
      fractions[f"router/{name}/load"] = fraction
      used = fraction[fraction > 0]
      scalars[f"router/{name}/max_vio"] = float(fraction.max() * fraction.size - 1)
      scalars[f"router/{name}/entropy"] = float(-(used * np.log(used)).sum() / np.log(max(fraction.size, 2)))
      scalars[f"router/{name}/dead_experts"] = int(fraction.size - used.size)
  if scalars:
    scalars["max_vio"] = float(np.mean([v for key, v in scalars.items() if key.endswith("max_vio")]))
  return scalars, fractions
