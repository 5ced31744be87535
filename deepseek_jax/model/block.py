"""One pre-norm transformer block."""

import dataclasses

import jax
from flax import nnx

from deepseek_jax.model.attention_kinds import ATTENTION
from deepseek_jax.model.batch_context import BatchContext
from deepseek_jax.model.dropout import dropout, fold_in_grid
from deepseek_jax.model.layer_output import LayerOutput
from deepseek_jax.model.mlp import SwiGLU
from deepseek_jax.model.moe import MoE
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.model.paged_cache import LayerCache
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.sharding import all_gather_sequence, reduce_scatter_sequence
from deepseek_jax.typing import PyTree


class Block(nnx.Module):
  """x + attn(norm(x)), then x + mlp(norm(x)). The feed-forward is a SwiGLU, `mlp`, or a mixture of experts, `moe`.

  On a tensor mesh, the residual stream x is sharded over positions. Heads and inner widths are sharded inside the two
  halves: each all-gathers its input and reduce-scatters its output over the sequence (Korthikanti et al. 2022).
  """

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None, is_moe: bool = False):
    self.attn_norm = RMSNorm(config.embed, config)
    self.attn = ATTENTION[config.attention.kind](config, rngs)
    self.mlp_norm = RMSNorm(config.embed, config)
    if is_moe:
      self.moe = MoE(config, rngs)
    else:
      self.mlp = SwiGLU(config.mlp, config, rngs)
    self.dropout, self.is_moe = config.dropout, is_moe

  def __call__(
    self, x: jax.Array, batch_context: BatchContext, dropout_key: jax.Array | None = None
  ) -> tuple[jax.Array, LayerOutput]:
    """(x, the attention's LayerOutput with the aux of the feed-forward); x is [batch, stream, embed]."""
    keys = (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
    y, output = self.attn(self.attn_norm(x), batch_context, keys[0])
    x = x + self.residual_dropout(reduce_scatter_sequence(y), batch_context, keys[1])
    y, aux = self.feed_forward(self.mlp_norm(x), batch_context)
    x = x + self.residual_dropout(reduce_scatter_sequence(y), batch_context, keys[2])
    return x, dataclasses.replace(output, aux=output.aux | aux | {"output": x})

  def feed_forward(self, x: jax.Array, batch_context: BatchContext) -> tuple[jax.Array, dict[str, PyTree]]:
    """(y [batch, seq, embed], aux of LayerOutput); x is [batch, stream, embed].

    y has partial sums over the devices that share `mlp`; the caller reduce-scatters.
    """
    x = all_gather_sequence(x)
    if not self.is_moe:
      return self.mlp(x), {}
    y, routing = self.moe(x, batch_context)
    return y, {"routing": routing}

  def residual_dropout(self, y: jax.Array, batch_context: BatchContext, key: jax.Array | None) -> jax.Array:
    """`y` [batch, stream, embed] after dropout."""
    if not self.dropout:
      return y
    return dropout(y, self.dropout, fold_in_grid(key, batch_context.sequence_ids, batch_context.position_ids))

  def decode(self, x: jax.Array, batch_context: BatchContext, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
    """(x, cache with them) of the new tokens `x` [batch, new, embed], which `batch_context` describes."""
    y, cache = self.attn.decode(self.attn_norm(x), batch_context.rotation, cache)
    x = x + reduce_scatter_sequence(y)
    y, _ = self.feed_forward(self.mlp_norm(x), batch_context)
    return x + reduce_scatter_sequence(y), cache
