"""The mixture-of-experts feed-forward: shared experts for every token, routed experts for those that chose them."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model.dispatch import DISPATCH
from deepseek_jax.model.linear import Linear
from deepseek_jax.model.mlp import SwiGLU
from deepseek_jax.model.router import Router
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.sharding import on_each_device, spec, summed


class Experts(nnx.Module):
  """The routed experts' SwiGLUs, stacked: gate and up [experts, embed, mlp], down [experts, mlp, embed]."""

  def __init__(self, config: ModelConfig, rngs):
    shape = (config.moe.num_routed_experts, config.embed, config.moe.mlp)
    self.gate = Linear(shape, ("experts", "embed", "mlp"), config, rngs)
    self.up = Linear(shape, ("experts", "embed", "mlp"), config, rngs)
    self.down = Linear((shape[0], shape[2], shape[1]), ("experts", "mlp", "embed"), config, rngs)

  def gathered(self, dtype):
    """(gate, up, down) with all experts on every device, of which `mlp` stays sharded."""
    layouts = ((self.gate, (None, None, "mlp")), (self.up, (None, None, "mlp")), (self.down, (None, "mlp", None)))
    return [jax.reshard(linear.kernel[...].astype(dtype), spec(*axes)) for linear, axes in layouts]


class MoE(nnx.Module):
  """MoE eq. 3 and 6 (fine-grained and shared experts); returns its routing as well."""

  def __init__(self, config: ModelConfig, rngs):
    self.router = Router(config, rngs)
    self.experts = Experts(config, rngs)
    if config.moe.num_shared_experts:
      self.shared = SwiGLU(config.moe.num_shared_experts * config.moe.mlp, config, rngs)
    self.config = config.moe

  def __call__(self, x, exempt=None):
    """([batch, seq, embed], Routing). `exempt` [batch] bool: where dispatch=capacity drops nothing; default everywhere."""
    routing, config = self.router(x), self.config
    exempt = jnp.ones(x.shape[:1], bool, out_sharding=spec("batch")) if exempt is None else exempt
    tokens = ("batch", "seq", None)
    dispatch = on_each_device(
      functools.partial(self.dispatched, config),
      (tokens, tokens, tokens, ("batch",), (None, None, "mlp"), (None, None, "mlp"), (None, "mlp", None)),
      tokens,
    )
    y = dispatch(x, routing.indices, routing.weights, exempt, *self.experts.gathered(x.dtype))
    if config.num_shared_experts:
      y = y + self.shared(x)
    return y, routing

  @staticmethod
  def dispatched(config, x, indices, weights, exempt, gate, up, down):
    """Output of the routed experts for one device's sequences: all arrays are its own shards."""
    batch, seq, embed = x.shape
    exempt = jnp.repeat(exempt, seq)  # [tokens]
    flat = (x.reshape(-1, embed), indices.reshape(batch * seq, -1), weights.reshape(batch * seq, -1))
    y = DISPATCH[config.dispatch](config, *flat, exempt, gate, up, down)  # [tokens, embed]
    return summed(y, "mlp").reshape(x.shape)
