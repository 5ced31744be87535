"""Expert parallelism: each device holds some of the experts, and tokens are sent to the devices of their experts.

- A token goes to a device once, however many of that device's experts it chose, with its choices and weights.
- What comes back is the weighted sum of those experts' outputs.
- Buffers have one size for every step. Assignments that overflow the expert buffer are counted.

Example: 2 devices with 2 experts each, top-2, and 3 tokens on this device, which choose experts (0, 1), (1, 2), (3, 2).

- destinations are [0, 2], [0, 1], [2, 1]; 2 is none.
- send_rows = 6 rows are sorted by destination: tokens 0 and 1 for device 0, 1 and 2 for device 1, two unused rows.
- source, the token of each row, is [0, 1, 1, 2, 3, 3]; 3 is none.
- slots, the rows of each token, are [0, 6], [1, 2], [6, 3]; 6 is none.
- recv_rows = 6: in the worst case all 3 tokens of both devices go to one device.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.fp8_linear import Recipe
from deepseek_jax.kernels.implementations import device_kind
from deepseek_jax.kernels.row_gather import gather_rows, gather_sum_rows
from deepseek_jax.model.all_to_all import (
  AllToAllPlan,
  has_ragged_all_to_all,
  make_all_to_all_plan,
  padded_all_to_all,
  ragged_all_to_all,
)
from deepseek_jax.model.expert_buffers import expert_buffers
from deepseek_jax.model.linear import dequantize, fwd_and_dgrad_recipes, quantize_for_dispatch
from deepseek_jax.sharding import axis_size


def expert_parallel(
  x: jax.Array,
  indices: jax.Array,
  weights: jax.Array,
  num_experts: int,
  local_experts_fn: Callable[..., tuple[jax.Array, jax.Array]],
  buffer_factor: float = 0.0,
  recipe: Recipe | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Weighted sum of each token's routed experts, wherever those are.

  Args:
    x: [tokens, embed], this device's tokens.
    indices: int [tokens, experts per token], global expert numbers; `num_experts` for none, see Routing.
    weights: [tokens, experts per token].
    local_experts_fn: the experts of this device, numbered from 0:
      (x [rows, embed], indices [rows, n], weights [rows, n], expected_assignments, capacity) ->
      (y [rows, embed], overflow). An even load is `expected_assignments`. `overflow` counts the assignments over
      `capacity`, which are left out.
    buffer_factor: size of the expert buffer, in rows and in assignments, as a multiple of an even load. 0: the worst
      case, every token of every device.
    recipe: of FP8. Tokens and their gradients are then dispatched in FP8. What is combined stays in the compute dtype.

  Returns:
    y [tokens, embed], and overflow [] int32: assignments and rows that overflowed this device's expert buffer.
  """
  devices, (num_tokens, per_token) = axis_size("experts"), indices.shape
  experts_per_device = num_experts // devices
  buffers = expert_buffers(num_tokens, per_token, num_experts, devices, buffer_factor)
  if devices == 1:
    return local_experts_fn(x, indices, weights, buffers.expected_assignments, buffers.capacity)

  # Where tokens go.
  destinations = destination_devices(indices // experts_per_device, devices)  # [tokens, n]
  one_hot = destinations[..., None] == jnp.arange(devices)  # [tokens, n, devices]
  ranks = jnp.cumsum(one_hot.any(1), 0, dtype=jnp.int32)  # [tokens, devices]; a token's rank at its destination, from 1
  plan, overflow_rows = make_all_to_all_plan(ranks[-1], buffers.recv_rows)

  # Send slot of each (token, destination): rows are sorted by destination. `send_rows` stands for none.
  send_rows = buffers.send_rows
  slots = jnp.where(one_hot, (plan.send_offsets[plan.device] + ranks - 1)[:, None], 0).sum(-1)
  slots = jnp.where(destinations < devices, slots, send_rows)  # [tokens, n]
  # And back, for each send slot: its (token, destination) as one number, its token, its destination.
  pair = jnp.full((send_rows,), send_rows).at[slots].set(jnp.arange(send_rows).reshape(slots.shape), mode="drop")
  source = pair // slots.shape[1]
  destination = destinations.reshape(send_rows).at[pair].get(mode="fill", fill_value=devices)

  # The assignments of each row: experts as its destination numbers them, and their weights.
  row_experts = indices.at[source].get(mode="fill", fill_value=num_experts)  # [send_rows, experts per token]
  is_local = row_experts // experts_per_device == destination[:, None]
  local_experts = jnp.where(is_local, row_experts - destination[:, None] * experts_per_device, experts_per_device)
  local_experts, weights = compact_local_assignments(
    local_experts, gather_rows(weights, source, slots), experts_per_device
  )
  # As one array: integers of this size are exact in float32.
  assignments = jnp.concatenate([weights, local_experts.astype(weights.dtype)], -1)  # [send_rows, 2 n]

  collective = ragged_all_to_all if has_ragged_all_to_all(device_kind()) else padded_all_to_all
  all_to_all = functools.partial(collective, max_rows=num_tokens)
  fwd_recipe, dgrad_recipe = fwd_and_dgrad_recipes(recipe)
  x, assignments = dispatch((all_to_all, fwd_recipe), (x, assignments), plan, source, slots)  # [recv_rows, ...]
  weights, local_experts = jnp.split(assignments, 2, -1)
  is_filled = jnp.arange(buffers.recv_rows) < plan.send_sizes[:, plan.device].sum()
  local_experts = jnp.where(is_filled[:, None], local_experts.astype(jnp.int32), experts_per_device)
  y, overflow = local_experts_fn(x, local_experts, weights, buffers.expected_assignments, buffers.capacity)
  return combine((all_to_all, dgrad_recipe), y, plan, source, slots), overflow + overflow_rows


# (`ragged_all_to_all` or `padded_all_to_all` with its max_rows, recipe of FP8 or None). Static.
Transport = tuple[Callable[..., jax.Array], Recipe | None]
Residuals = tuple[AllToAllPlan, jax.Array, jax.Array]  # (plan, source, slots)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dispatch(
  transport: Transport,
  token_values: tuple[jax.Array, jax.Array],
  plan: AllToAllPlan,
  source: jax.Array,
  slots: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Sends tokens to the devices that hold their experts. Its gradient is `combine`.

  There are two messages. FP8 scales go with the assignments, in lanes that TPUs send anyway.

  Args:
    token_values: (x [tokens, embed], assignments [send_rows, n]).
    source: int [send_rows], the token of each row. slots: int [tokens, n], the rows of each token. As in `gather_rows`.

  Returns:
    (x [recv_rows, embed], assignments [recv_rows, n]) of the rows that arrived.
  """
  (all_to_all, recipe), (x, assignments) = transport, token_values
  values, scales = quantize_for_dispatch(recipe, x)
  values = all_to_all(gather_rows(values, source, slots), plan)
  width = assignments.shape[1]
  assignments = jnp.concatenate([assignments, gather_rows(scales, source, slots).astype(assignments.dtype)], 1)
  assignments = all_to_all(assignments, plan) if assignments.shape[1] else assignments
  return dequantize(recipe, values, assignments[:, width:], x.dtype), assignments[:, :width]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def combine(transport: Transport, y: jax.Array, plan: AllToAllPlan, source: jax.Array, slots: jax.Array) -> jax.Array:
  """Sends `y` [recv_rows, embed] back and sums each token's rows: [tokens, embed]. Its gradient is `dispatch`.

  The recipe of `transport` is for that gradient. Other arguments are as in `dispatch`.
  """
  all_to_all, _ = transport
  rows = all_to_all(y, plan, return_rows=source.size)  # [send_rows, embed]
  return gather_sum_rows(rows, source, slots).astype(y.dtype)


def _dispatch_fwd(
  transport: Transport,
  token_values: tuple[jax.Array, jax.Array],
  plan: AllToAllPlan,
  source: jax.Array,
  slots: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], Residuals]:
  return dispatch(transport, token_values, plan, source, slots), (plan, source, slots)


def _dispatch_bwd(
  transport: Transport, residuals: Residuals, gradients: tuple[jax.Array, jax.Array]
) -> tuple[tuple[jax.Array, jax.Array], None, None, None]:
  (all_to_all, _), (plan, source, slots), (dx, d_assignments) = transport, residuals, gradients
  dx = combine(transport, dx, plan, source, slots)
  return (dx, all_to_all(d_assignments, plan, return_rows=source.size)), None, None, None


def _combine_fwd(
  transport: Transport, y: jax.Array, plan: AllToAllPlan, source: jax.Array, slots: jax.Array
) -> tuple[jax.Array, Residuals]:
  return combine(transport, y, plan, source, slots), (plan, source, slots)


def _combine_bwd(transport: Transport, residuals: Residuals, dy: jax.Array) -> tuple[jax.Array, None, None, None]:
  plan, source, slots = residuals
  no_assignments = jnp.zeros((source.size, 0), jnp.float32)
  return dispatch(transport, (dy, no_assignments), plan, source, slots)[0], None, None, None


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)
combine.defvjp(_combine_fwd, _combine_bwd)


def destination_devices(expert_devices: jax.Array, devices: int) -> jax.Array:
  """The devices that each token goes to, each once.

  Args:
    expert_devices: int [tokens, experts per token], the device of each chosen expert; `devices` for no assignment.

  Returns:
    int [tokens, n] with n = min(devices, experts per token); unused entries are `devices`.
  """
  per_token = expert_devices.shape[1]
  if devices <= per_token:
    device = jnp.arange(devices)
    return jnp.where((expert_devices[..., None] == device).any(1), device, devices)
  earlier = jnp.tril(jnp.ones((per_token, per_token), bool), -1)
  is_repeated = ((expert_devices[:, :, None] == expert_devices[:, None]) & earlier).any(-1)
  return jnp.where(is_repeated, devices, expert_devices)


def compact_local_assignments(
  local_experts: jax.Array, weights: jax.Array, experts_per_device: int
) -> tuple[jax.Array, jax.Array]:
  """Moves each row's local assignments to its front and cuts what cannot be filled.

  A token chooses each expert at most once, so that n = min(k, experts_per_device) columns suffice.

  Args:
    local_experts: int [rows, k], `experts_per_device` for an assignment to another device. weights: [rows, k].

  Returns:
    local_experts [rows, n] and weights [rows, n].
  """
  width = min(local_experts.shape[1], experts_per_device)
  is_local = local_experts < experts_per_device
  one_hot = is_local[..., None] & (jnp.cumsum(is_local, 1)[..., None] - 1 == jnp.arange(width))  # [rows, k, n]

  def compact(x):
    return jnp.where(one_hot, x[..., None], 0).sum(1)

  return jnp.where(one_hot.any(1), compact(local_experts), experts_per_device), compact(weights)
