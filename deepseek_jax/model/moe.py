"""The mixture-of-experts feed-forward: shared experts for every token, routed experts for those that chose them."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model.batch_context import BatchContext
from deepseek_jax.model.dispatch import DISPATCH, token_dropping_mask
from deepseek_jax.model.expert_parallel import expert_parallel
from deepseek_jax.model.linear import Linear
from deepseek_jax.model.mlp import SwiGLU
from deepseek_jax.model.router import Routing
from deepseek_jax.model.router_kinds import ROUTERS
from deepseek_jax.model_config import ModelConfig


class Experts(nnx.Module):
  """The routed experts' SwiGLUs, stacked: gate and up [experts, embed, mlp], down [experts, mlp, embed]."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None):
    shape = (config.moe.num_routed_experts, config.embed, config.moe.mlp)
    self.gate = Linear(shape, ("experts", "expert_embed", "mlp"), config, rngs)
    self.up = Linear(shape, ("experts", "expert_embed", "mlp"), config, rngs)
    self.down = Linear((shape[0], shape[2], shape[1]), ("experts", "mlp", "expert_embed"), config, rngs)

  def weights(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(gate, up, down) of the experts that this device holds, in `dtype`, all-gathered for use."""
    return self.gate.weight(dtype), self.up.weight(dtype), self.down.weight(dtype)


class MoE(nnx.Module):
  """Fine-grained routed experts and shared experts (DeepSeekMoE eq. 3 and 6)."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None):
    self.router = ROUTERS[config.moe.router](config, rngs)
    self.experts = Experts(config, rngs)
    if config.moe.num_shared_experts:
      self.shared = SwiGLU(config.moe.num_shared_experts * config.moe.mlp, config, rngs)
    self.config = config.moe

  def __call__(self, x: jax.Array, batch_context: BatchContext) -> tuple[jax.Array, Routing]:
    """(partial sums [batch, seq, embed] over the devices that share `mlp`, Routing) of `x` [batch, seq, embed].

    Of `batch_context` it uses `token_mask`, `no_drop` with dispatch=capacity, and what the router uses.
    """
    config, (batch, seq, _) = self.config, x.shape
    token_mask, routing = batch_context.token_mask, self.router(x, batch_context)
    indices = routing.indices
    if token_mask is not None:  # masked tokens choose no expert
      indices = jnp.where(token_mask[..., None], indices, config.num_routed_experts)
    x_tokens, token_indices, token_weights = (a.reshape(batch * seq, -1) for a in (x, indices, routing.weights))
    y, overflow = self.routed_experts(x_tokens, token_indices, token_weights, batch_context.no_drop)
    y = y.reshape(x.shape)
    if config.num_shared_experts:
      # This needs nothing that is sent, so that the scheduler can overlap it with the all-to-all.
      y = y + self.shared(x)
    return y, dataclasses.replace(routing, indices=indices, token_mask=token_mask, overflow=overflow)

  def routed_experts(
    self, x: jax.Array, indices: jax.Array, weights: jax.Array, no_drop: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    """Output of the routed experts: (y [tokens, embed], overflow [] int32), as in `expert_parallel`.

    x: [tokens, embed]. indices, weights: [tokens, experts per token]. no_drop: bool [batch], None: drop nothing.
    """
    config, expert_weights, recipe = self.config, self.experts.weights(x.dtype), self.experts.gate.recipe
    if config.dispatch == "capacity" and no_drop is not None:
      no_drop = jnp.repeat(no_drop, x.shape[0] // no_drop.size)  # [tokens]
      indices = jnp.where(token_dropping_mask(config, indices, weights, no_drop), indices, config.num_routed_experts)

    def local_experts_fn(x, indices, weights, expected_assignments, capacity):
      """The experts of this device, as `expert_parallel` calls them."""
      return DISPATCH[config.dispatch](
        x, indices, weights, *expert_weights, expected_assignments, capacity, recipe, config.implementation
      )

    return expert_parallel(
      x, indices, weights, config.num_routed_experts, local_experts_fn, config.buffer_factor, recipe
    )
