"""The forward pass of new tokens after cached ones: a chunk of a prompt, the next token, or a draft with it."""

import dataclasses

import jax
import jax.numpy as jnp

from deepseek_jax.model.batch_context import BatchContext
from deepseek_jax.model.linear import matmul_precision
from deepseek_jax.model.paged_cache import CacheArrays, CachePositions, LayerCache
from deepseek_jax.model.transformer import Transformer


def decode(
  model: Transformer, ids: jax.Array, cache: dict[str, CacheArrays], where: CachePositions
) -> tuple[jax.Array, dict[str, CacheArrays]]:
  """(hidden states [batch, new, embed] after the final norm, cache with the new tokens).

  Args:
    ids: int [batch, new], the new tokens.
    cache: of each stack. What it has of other layers stays as it is.
    where: positions of the new tokens, and the pages of their sequences.
  """
  cache, batch_context = dict(cache), decode_context(model, ids, where)

  def layer(carry, layer_inputs):
    (x, arrays), (block, number) = carry, layer_inputs
    x, layer_cache = block.decode(x, batch_context, LayerCache(arrays, number, where))
    return (x, layer_cache.arrays), None

  with matmul_precision(model.config):
    x = model.embed_tokens(ids)
    for name, layers in model.stacks():
      numbers = jnp.arange(getattr(model.config, f"num_{name}"))
      (x, cache[name]), _ = jax.lax.scan(layer, (x, cache[name]), (layers, numbers))
    return model.final_norm(x), cache


def decode_mtp(
  model: Transformer, hidden: jax.Array, next_ids: jax.Array, cache: CacheArrays, where: CachePositions
) -> tuple[jax.Array, CacheArrays]:
  """(hidden states [batch, new, embed], cache with them) of the first depth of multi-token prediction (V3 eq. 21 to 23).

  Args:
    hidden: [batch, new, embed], of the main model. next_ids: int [batch, new], the ids one position later.
    cache: of this depth. where: of the hidden states.
  """
  mtp_layer = jax.tree.map(lambda p: p[0], model.mtp_layers)
  batch_context, layer_cache = (
    decode_context(model, next_ids, where),
    LayerCache(cache, jnp.zeros((), jnp.int32), where),
  )
  with matmul_precision(model.config):
    hidden, layer_cache = mtp_layer.decode(hidden, model.embed_tokens(next_ids), batch_context, layer_cache)
  return hidden, layer_cache.arrays


def decode_context(model: Transformer, ids: jax.Array, where: CachePositions) -> BatchContext:
  """The BatchContext of new tokens `ids` int [batch, new]."""
  new = ids.shape[1]
  batch_context = model.batch_context(ids, rope_positions=where.positions(new))
  return dataclasses.replace(batch_context, token_mask=where.is_token(new))
