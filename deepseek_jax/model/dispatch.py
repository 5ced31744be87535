"""How tokens meet their experts. Each form is the same function where nothing is dropped; all see one device's arrays.

A form takes (config, x [tokens, embed], indices [tokens, experts per token], weights likewise, exempt [tokens]
bool, gate and up [experts, embed, mlp], down [experts, mlp, embed]) and returns [tokens, embed].
"""

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.grouped_matmul import block_rows, grouped_matmul


def dense(config, x, indices, weights, exempt, gate, up, down):
  """Every expert on every token, weighted with zero where it was not chosen: the reference."""
  h = jax.nn.silu(jnp.einsum("td,edf->tef", x, gate)) * jnp.einsum("td,edf->tef", x, up)  # [tokens, experts, mlp]
  y = jnp.einsum("tef,efd->ted", h, down)  # [tokens, experts, embed]
  chosen = indices[..., None] == jnp.arange(gate.shape[0])  # [tokens, experts per token, experts]
  share = jnp.where(chosen, weights[..., None], 0).sum(1)  # [tokens, experts]
  return (y * share[..., None]).sum(1).astype(x.dtype)


def ragged(config, x, indices, weights, exempt, gate, up, down):
  """Choices sorted by expert, each expert's rows multiplied by its own matrices. Nothing is dropped.

  An index equal to the number of experts is a choice that does not count.
  """
  tokens, experts = x.shape[0], gate.shape[0]
  choices = indices.size
  block = block_rows(choices, experts)
  slots, sizes = expert_slots(indices.reshape(-1), experts, block)
  rows = -(-choices // block) * block + experts * block
  # Row r of the sorted layout holds token source[r]; `tokens` stands for none, which reads as zeros.
  source = jnp.full((rows,), tokens).at[slots].set(jnp.arange(choices) // indices.shape[1], mode="drop")
  sorted_x = x.at[source].get(mode="fill", fill_value=0)  # [rows, embed]
  h = jax.nn.silu(grouped_matmul(sorted_x, gate, sizes, block=block)) * grouped_matmul(sorted_x, up, sizes, block=block)
  y = grouped_matmul(h, down, sizes, block=block)  # [rows, embed]
  y = y.at[slots].get(mode="fill", fill_value=0).reshape(*indices.shape, -1)  # [tokens, experts per token, embed]
  # The weight multiplies after down (the released models do so), and sums in at least float32.
  return (y * weights[..., None]).sum(1).astype(x.dtype)


def expert_slots(choices, experts, block):
  """Where each of `choices` [n] goes when they are sorted by expert and each expert's rows padded to a multiple of `block`.

  Returns:
    (slots [n] int32, out of every range for choices that do not count; padded sizes [experts] int32).
  """
  order = jnp.argsort(choices, stable=True)  # [n]
  counts = jnp.bincount(choices, length=experts)  # those that do not count are out of range
  sizes = -(-counts // block) * block
  first, start = jnp.cumsum(counts) - counts, jnp.cumsum(sizes) - sizes
  expert = choices[order]
  slot = jnp.arange(choices.size) - first.at[expert].get(mode="clip") + start.at[expert].get(mode="clip")
  slot = jnp.where(expert < experts, slot, jnp.iinfo(jnp.int32).max)
  return jnp.zeros_like(choices).at[order].set(slot.astype(choices.dtype)), sizes.astype(jnp.int32)


def capacity(config, x, indices, weights, exempt, gate, up, down):
  """`ragged` after V2's token dropping (section 2.2.4)."""
  indices = jnp.where(kept(config, indices, weights, exempt), indices, gate.shape[0])
  return ragged(config, x, indices, weights, exempt, gate, up, down)


def kept(config, indices, weights, exempt):
  """Which choices stay: of each group of experts the ones of highest affinity, up to its share of all choices.

  V2 gives each device, which holds a group of experts, `capacity_factor` times the even share of the choices of its
  batch, and never drops those of exempt sequences. The batch is what one device of our mesh holds.
  """
  groups = config.num_expert_groups
  budget = config.capacity_factor * indices.size / groups
  group = (indices // (config.num_routed_experts // groups)).reshape(-1)  # [choices]
  affinity = jnp.where(exempt[:, None], jnp.inf, weights).reshape(-1)
  order = jnp.lexsort((-affinity, group))  # by group, then from the highest affinity down
  counts = jnp.bincount(group, length=groups)
  rank = jnp.arange(group.size) - (jnp.cumsum(counts) - counts)[group[order]]
  rank = jnp.zeros_like(rank).at[order].set(rank)
  return ((rank < budget) | jnp.isinf(affinity)).reshape(indices.shape)


DISPATCH = {"dense": dense, "ragged": ragged, "capacity": capacity}
