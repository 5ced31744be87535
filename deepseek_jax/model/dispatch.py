"""How the experts of one device compute the tokens assigned to them.

Each form of dispatch is a function with one signature, and all give the same result where nothing overflows.

  Args:
    x: [rows, embed].
    indices: int [rows, experts per token], experts of this device, or no assignment, see Routing.
    weights: [rows, experts per token].
    gate, up: [experts, embed, mlp]. down: [experts, mlp, embed].
    expected_assignments: number of assignments under an even load.
    capacity: number of assignments that the expert buffer holds.
    recipe: of FP8, or None. implementation: of the grouped matmuls.

  Returns:
    y [rows, embed], and overflow [] int32: assignments over `capacity`, which are left out of y.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.fp8_linear import Recipe
from deepseek_jax.kernels.row_gather import gather_rows, gather_sum_rows
from deepseek_jax.model.expert_buffers import sorted_layout
from deepseek_jax.model.linear import apply_swiglu, grouped_linear
from deepseek_jax.model_config import MoEConfig


def dense(
  x: jax.Array,
  indices: jax.Array,
  weights: jax.Array,
  gate: jax.Array,
  up: jax.Array,
  down: jax.Array,
  expected_assignments: int,
  capacity: int,
  recipe: Recipe | None = None,
  implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
  """Every expert on every row, weighted with zero where it was not chosen: the reference. Nothing overflows."""
  h = apply_swiglu((jnp.einsum("td,edf->tef", x, gate), jnp.einsum("td,edf->tef", x, up)))  # [rows, experts, mlp]
  y = jnp.einsum("tef,efd->ted", h, down)  # [rows, experts, embed]
  chosen = indices[..., None] == jnp.arange(gate.shape[0])  # [rows, experts per token, experts]
  expert_weights = jnp.where(chosen, weights[..., None], 0).sum(1)  # [rows, experts]
  return (y * expert_weights[..., None]).sum(1).astype(x.dtype), jnp.zeros((), jnp.int32)


def ragged(
  x: jax.Array,
  indices: jax.Array,
  weights: jax.Array,
  gate: jax.Array,
  up: jax.Array,
  down: jax.Array,
  expected_assignments: int,
  capacity: int,
  recipe: Recipe | None = None,
  implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
  """Assignments sorted by expert, then one grouped matmul of each expert's rows with its own matrices."""
  num_experts = gate.shape[0]
  block, sorted_rows = sorted_layout(expected_assignments, capacity, num_experts)
  slots, group_sizes, num_assignments = assign_slots(indices.reshape(-1), num_experts, block)
  # The assignment of each sorted row; `indices.size` stands for none, which reads as zeros.
  assignment = jnp.full((sorted_rows,), indices.size).at[slots].set(jnp.arange(indices.size), mode="drop")
  row = assignment // indices.shape[1]  # [sorted_rows], the row of x of each sorted row
  row_slots = slots.reshape(indices.shape)  # [rows, experts per token], the sorted rows of each row of x
  sorted_x = gather_rows(x, row, row_slots)  # [sorted_rows, embed]
  gate, up = grouped_linear(recipe, sorted_x, (gate, up), group_sizes, block, implementation)  # [sorted_rows, mlp]
  (y,) = grouped_linear(recipe, (gate, up), (down,), group_sizes, block, implementation)  # [sorted_rows, embed]
  # The weight multiplies after down, as in the released models; the sum is in at least float32.
  y = y * gather_rows(weights.reshape(-1, 1), assignment, slots[:, None])
  return gather_sum_rows(y, row, row_slots).astype(x.dtype), jnp.maximum(num_assignments - capacity, 0)


def assign_slots(indices: jax.Array, num_experts: int, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The sorted row of each assignment, where each expert's rows are padded to a multiple of `block`.

  Args:
    indices: int [n], the expert of each assignment; `num_experts` for none.

  Returns:
    slots [n] int32, out of range for assignments that do not count; padded group sizes [experts] int32; number of
    assignments that count [] int32.
  """
  # A cumulative sum, no sort: a sort of many rows takes the TPU compiler seconds, in every pass of every layer.
  chosen = indices[:, None] == jnp.arange(num_experts)  # [n, experts]; no expert for those that do not count
  ranks = jnp.cumsum(chosen, 0, dtype=jnp.int32)
  counts = ranks[-1]
  group_sizes = -(-counts // block) * block
  group_starts = jnp.cumsum(group_sizes) - group_sizes
  slots = jnp.where(chosen, group_starts + ranks - 1, 0).sum(1)
  slots = jnp.where(indices < num_experts, slots, jnp.iinfo(jnp.int32).max)
  return slots, group_sizes.astype(jnp.int32), counts.sum(dtype=jnp.int32)


def token_dropping_mask(config: MoEConfig, indices: jax.Array, weights: jax.Array, no_drop: jax.Array) -> jax.Array:
  """Which assignments V2's token dropping keeps (section 2.2.4): of each group of experts, those of highest affinity.

  A group of experts, a device in V2, has a budget: `capacity_factor` times an even load of the batch's assignments. The
  batch is here what one device of our mesh holds.

  Args:
    indices, weights: [tokens, experts per token]. no_drop: bool [tokens], of sequences that keep all.

  Returns:
    bool [tokens, experts per token].
  """
  groups = config.num_expert_groups
  budget = config.capacity_factor * indices.size / groups
  group = (indices // (config.num_routed_experts // groups)).reshape(-1)  # [assignments]
  affinity = jnp.where(no_drop[:, None], jnp.inf, weights).reshape(-1)
  order = jnp.lexsort((-affinity, group))  # by group, then from the highest affinity down
  counts = jnp.bincount(group, length=groups)
  rank = jnp.arange(group.size) - (jnp.cumsum(counts) - counts).at[group[order]].get(mode="clip")
  rank = jnp.zeros_like(rank).at[order].set(rank)
  return ((rank < budget) | jnp.isinf(affinity)).reshape(indices.shape)


DISPATCH = {"dense": dense, "ragged": ragged, "capacity": ragged}  # capacity: after `token_dropping_mask`
