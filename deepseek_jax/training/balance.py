"""Keeping experts equally busy: the papers' balance losses, V3's bias without a loss, and what there is to watch.

Everything is per sequence (as in V2's released code and V3 eq. 17 to 20) or a sum over the whole batch, so that neither
microbatches nor the mesh change it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import BalanceConfig
from deepseek_jax.model_config import ModelConfig, MoEConfig
from deepseek_jax.sharding import psum


def make_observe(moe: MoEConfig, balance: BalanceConfig):
  """For the model's `observe`, of a device's part of the batch: a layer's {load: [experts] int32 choices; loss: [batch], the
  weighted balance losses; overflow: [] int32, assignments that overflowed the expert buffer}."""

  def observe(routing, kept):
    if routing is None:
      return None
    counts = expert_counts(routing.indices, moe.num_routed_experts)  # [batch, experts]
    loss = balance_loss(routing, counts, moe, balance)
    return {"load": counts.sum(0, dtype=jnp.int32), "loss": loss, "overflow": routing.overflow}

  return observe


def expert_counts(indices, experts):
  """[batch, experts] int32: how many choices of `indices` [batch, seq, experts per token] each expert has.

  Of the whole sequence, whatever part of it a device has.
  """
  return psum((indices[..., None] == jnp.arange(experts)).sum((1, 2), dtype=jnp.int32), "seq")


def balance_loss(routing, counts, moe: MoEConfig, balance: BalanceConfig):
  """[batch]: the weighted sum of the losses of `balance`, each of a whole sequence.

  f counts the choices as they were made. V3 eq. 18 counts the best raw scores instead; implementations count as here.
  """
  here = jnp.ones((1, routing.indices.shape[1]), bool) if routing.token_mask is None else routing.token_mask
  here = here.astype(routing.scores.dtype)  # [batch or 1, seq]
  tokens = psum(here.sum(1, keepdims=True), "seq")  # [batch or 1, 1]

  def mean(x):
    """Of `x` [batch, seq, ...] over the tokens of each sequence."""
    weight = here.reshape(*here.shape, *(1,) * (x.ndim - 2))
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
    sent = (device[..., None] == jnp.arange(groups)).any(2)  # [batch, seq, groups]: tokens, however many experts
    loss += balance.communication_loss * (groups / moe.topk_groups * mean(sent) * device_p).sum(-1)
  if balance.router_z_loss:
    loss += balance.router_z_loss * mean(jnp.square(jax.nn.logsumexp(routing.logits, -1)))
  return loss


def update_router_bias(buffers, loads, speed):
  """`buffers` with each router's bias moved by `speed`: up where the load is below the mean, down where above.

  V3 section 2.1.2. `loads`: {name of the stack: [layers, experts] choices of the whole batch}.
  """

  def moved(path, bias):
    load = loads[path[0].key].astype(bias.dtype)
    return bias + speed.astype(bias.dtype) * jnp.sign(load.mean(-1, keepdims=True) - load)

  return jax.tree.map_with_path(moved, buffers)


def load_metrics(model: ModelConfig, loads):
  """Scalars and shares to log, from the loads of a step as NumPy arrays.

  Returns:
    (scalars, {name of the layer: [experts] share of its choices}). max_vio is max / mean - 1 (0: balanced), entropy is
    that of the shares over its maximum (1: balanced), dead_experts were chosen by no token.
  """
  names = {"moe_layers": ("layer", model.num_dense_layers), "mtp_layers": ("mtp", 1)}
  scalars, shares = {}, {}
  for stack, load in loads.items():
    name, first = names[stack]
    for i, layer in enumerate(np.asarray(load, np.float64), first):
      share = layer / layer.sum()
      shares[f"router/{name}_{i}/load"] = share
      positive = share[share > 0]
      scalars[f"router/{name}_{i}/max_vio"] = float(share.max() * share.size - 1)
      scalars[f"router/{name}_{i}/entropy"] = float(-(positive * np.log(positive)).sum() / np.log(max(share.size, 2)))
      scalars[f"router/{name}_{i}/dead_experts"] = int(share.size - positive.size)
  if scalars:
    scalars["max_vio"] = float(np.mean([v for key, v in scalars.items() if key.endswith("max_vio")]))
  return scalars, shares
