"""The mixture-of-experts feed-forward: shared experts for every token, routed experts for those that chose them."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model.dispatch import DISPATCH, within_capacity
from deepseek_jax.model.expert_parallel import expert_parallel
from deepseek_jax.model.linear import Linear
from deepseek_jax.model.mlp import SwiGLU
from deepseek_jax.model.router import Router
from deepseek_jax.model_config import ModelConfig


class Experts(nnx.Module):
  """The routed experts' SwiGLUs, stacked: gate and up [experts, embed, mlp], down [experts, mlp, embed]."""

  def __init__(self, config: ModelConfig, rngs):
    shape = (config.moe.num_routed_experts, config.embed, config.moe.mlp)
    self.gate = Linear(shape, ("experts", "expert_embed", "mlp"), config, rngs)
    self.up = Linear(shape, ("experts", "expert_embed", "mlp"), config, rngs)
    self.down = Linear((shape[0], shape[2], shape[1]), ("experts", "mlp", "expert_embed"), config, rngs)

  def weights(self, dtype):
    """(gate, up, down) of the experts that this device holds."""
    return [linear.weight(dtype) for linear in (self.gate, self.up, self.down)]


class MoE(nnx.Module):
  """MoE eq. 3 and 6 (fine-grained and shared experts); returns its routing as well."""

  def __init__(self, config: ModelConfig, rngs):
    self.router = Router(config, rngs)
    self.experts = Experts(config, rngs)
    if config.moe.num_shared_experts:
      self.shared = SwiGLU(config.moe.num_shared_experts * config.moe.mlp, config, rngs)
    self.config = config.moe

  def __call__(self, x, tokens=None):
    """(terms of the sum [batch, seq, embed], Routing); `tokens` a BatchContext, of which dispatch=capacity needs `no_drop`."""
    config, (batch, seq, _) = self.config, x.shape
    routing = self.router(x)
    indices = routing.indices
    if tokens is not None and tokens.token_mask is not None:  # the others choose no expert
      indices = jnp.where(tokens.token_mask[..., None], indices, config.num_routed_experts)
    flat = (a.reshape(batch * seq, -1) for a in (x, indices, routing.weights))
    y, overflow = self.routed(*flat, None if tokens is None else tokens.no_drop)
    y = y.reshape(x.shape)
    if config.num_shared_experts:
      # Needs nothing of what travels: a scheduler computes it meanwhile.
      y = y + self.shared(x)
    token_mask = None if tokens is None else tokens.token_mask
    return y, dataclasses.replace(routing, indices=indices, token_mask=token_mask, overflow=overflow)

  def routed(self, x, indices, weights, no_drop):
    """(y [tokens, embed], assignments that overflowed the expert buffer) of `x` [tokens, embed]."""
    config, kernels, recipe = self.config, self.experts.weights(x.dtype), self.experts.gate.recipe
    travel = indices
    if config.dispatch == "capacity" and no_drop is not None:
      no_drop = jnp.repeat(no_drop, x.shape[0] // no_drop.size)  # [tokens]
      travel = jnp.where(within_capacity(config, indices, weights, no_drop), indices, config.num_routed_experts)

    def compute(x, indices, weights, load, most):
      return DISPATCH[config.dispatch](x, indices, weights, *kernels, load, most, recipe, config.implementation)

    return expert_parallel(x, travel, weights, config.num_routed_experts, compute, config.buffer_factor, recipe)
