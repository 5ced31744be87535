"""How the experts of one device compute what tokens chose them for.

A form takes (x [rows, embed], indices [rows, experts per token], weights likewise, gate and up [experts, embed, mlp],
down [experts, mlp, embed], load, most, for FP8 a recipe, the implementation of grouped matmuls) and returns (y [rows, embed], choices over `most`, which it left out); `load` choices
are expected. An index equal to the number of experts is a choice that does not count. The forms are one function where
nothing is left out.
"""

import jax.numpy as jnp

from deepseek_jax.kernels.grouped_matmul.api import block_rows
from deepseek_jax.kernels.rows import rows_at, sums_at
from deepseek_jax.model.linear import grouped_linear, swiglu


def dense(x, indices, weights, gate, up, down, load, most, recipe=None, implementation="auto"):
  """Every expert on every row, weighted with zero where it was not chosen: the reference. Nothing is over `most`."""
  h = swiglu((jnp.einsum("td,edf->tef", x, gate), jnp.einsum("td,edf->tef", x, up)))  # [rows, experts, mlp]
  y = jnp.einsum("tef,efd->ted", h, down)  # [rows, experts, embed]
  chosen = indices[..., None] == jnp.arange(gate.shape[0])  # [rows, experts per token, experts]
  share = jnp.where(chosen, weights[..., None], 0).sum(1)  # [rows, experts]
  return (y * share[..., None]).sum(1).astype(x.dtype), jnp.zeros((), jnp.int32)


def ragged(x, indices, weights, gate, up, down, load, most, recipe=None, implementation="auto"):
  """Choices sorted by expert, each expert's rows multiplied by its own matrices."""
  experts = gate.shape[0]
  block = block_rows(load, experts)
  slots, sizes, counted = assign_slots(indices.reshape(-1), experts, block)
  rows = -(-most // block) * block + experts * block
  # Row r of the sorted layout is for choice number choice[r]; `indices.size` stands for none, which reads as zeros.
  choice = jnp.full((rows,), indices.size).at[slots].set(jnp.arange(indices.size), mode="drop")
  places = choice // indices.shape[1], slots.reshape(indices.shape)  # the token of each row, the rows of each token
  sorted_x = rows_at(x, *places)  # [rows, embed]
  gate, up = grouped_linear(recipe, sorted_x, (gate, up), sizes, block, implementation)  # [rows, mlp]
  (y,) = grouped_linear(recipe, (gate, up), (down,), sizes, block, implementation)  # [rows, embed]
  # The weight multiplies after down (the released models do so), and sums in at least float32.
  y = y * rows_at(weights.reshape(-1, 1), choice, slots[:, None])
  return sums_at(y, *places).astype(x.dtype), jnp.maximum(counted - most, 0)


def assign_slots(choices, experts, block):
  """Where each of `choices` [n] goes when they are sorted by expert and each expert's rows padded to a multiple of `block`.

  Returns:
    (slots [n] int32, out of every range for choices that do not count; padded sizes [experts] int32; choices that count).
  """
  # Counted, not sorted: a sort of many rows takes TPUs' compiler seconds, and there is one in every pass of every layer.
  chosen = choices[:, None] == jnp.arange(experts)  # [n, experts]; no expert for those that do not count
  ranks = jnp.cumsum(chosen, 0, dtype=jnp.int32)
  counts = ranks[-1]
  sizes = -(-counts // block) * block
  slots = jnp.where(chosen, jnp.cumsum(sizes) - sizes + ranks - 1, 0).sum(1)
  slots = jnp.where(choices < experts, slots, jnp.iinfo(jnp.int32).max)
  return slots, sizes.astype(jnp.int32), counts.sum(dtype=jnp.int32)


def within_capacity(config, indices, weights, no_drop):
  """Which choices V2's token dropping leaves (section 2.2.4): of each group of experts those of highest affinity.

  V2 gives each device, which holds a group of experts, `capacity_factor` times the even share of the choices of its
  batch, and never drops those of sequences with `no_drop` [tokens]. The batch is what one device of our mesh holds.
  """
  groups = config.num_expert_groups
  budget = config.capacity_factor * indices.size / groups
  group = (indices // (config.num_routed_experts // groups)).reshape(-1)  # [choices]
  affinity = jnp.where(no_drop[:, None], jnp.inf, weights).reshape(-1)
  order = jnp.lexsort((-affinity, group))  # by group, then from the highest affinity down
  counts = jnp.bincount(group, length=groups)
  rank = jnp.arange(group.size) - (jnp.cumsum(counts) - counts).at[group[order]].get(mode="clip")
  rank = jnp.zeros_like(rank).at[order].set(rank)
  return ((rank < budget) | jnp.isinf(affinity)).reshape(indices.shape)


DISPATCH = {"dense": dense, "ragged": ragged, "capacity": ragged}  # capacity: after `within_capacity`
