"""Expert parallelism: each device holds some of the experts, and tokens travel to the devices that hold their choices.

A token goes to a device once, however many of the device's experts it chose, with its choices and weights; what comes back
is the weighted sum of those experts' outputs. Buffers have one size for every step; what finds no room is counted.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.implementations import device_kind, vary
from deepseek_jax.kernels.rows import rows_at, sums_at
from deepseek_jax.model.linear import dequantize, fwd_and_dgrad_recipes, quantize_for_dispatch
from deepseek_jax.sharding import axis_index, axis_size, mesh_axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AllToAllPlan:
  """Who sends how many rows to whom, and where they lie; [source, destination] int32 each, and known to all devices.

  Rows are sorted by destination where they start, and by source in the `recv_rows` rows of where they arrive.
  """

  send_sizes: jax.Array  # rows, all of which find room
  send_offsets: jax.Array  # first of them at the source
  recv_offsets: jax.Array  # first of them at the destination
  device: jax.Array
  recv_rows: int = dataclasses.field(metadata={"static": True})
  axis: str = dataclasses.field(metadata={"static": True})


def expert_parallel(x, indices, weights, experts, compute, buffer_factor=0.0, recipe=None):
  """Output of the routed experts, wherever they are: (y [tokens, embed], assignments that overflowed this device's expert buffer).

  Args:
    x: [tokens, embed], this device's. indices, weights: [tokens, experts per token]; an index of `experts`, the number
      of all of them, is a choice that does not count.
    compute: (x [rows, embed], indices and weights [rows, n], load, most) -> (y, lost) of this device's experts alone,
      numbered from 0: `load` choices when it is even, at most `most`; `lost` are those over it.
    buffer_factor: rows and choices that a device has room for, as a multiple of what it has under an even load; 0: the
      worst case, every token of every device.
    recipe: of FP8, in which tokens are then dispatched, and gradients backward; what is combined stays in the compute dtype.
  """
  devices, (tokens, per_token) = axis_size("experts"), indices.shape
  load, most = tokens * per_token, devices * tokens * min(per_token, experts // devices)
  if buffer_factor:
    most = min(most, int(buffer_factor * load))
  if devices == 1:
    return compute(x, indices, weights, load, most)
  each = experts // devices
  holders = destination_devices(indices // each, devices)  # [tokens, n]
  hit = holders[..., None] == jnp.arange(devices)  # [tokens, n, devices]
  ranks = jnp.cumsum(hit.any(1), 0, dtype=jnp.int32)  # [tokens, devices]
  room = min(devices * tokens, most)
  routes, lost_rows = make_all_to_all_plan(ranks[-1], room)
  # Row of each token among those sent, sorted by destination; `rows` is none.
  rows = holders.size
  slots = jnp.where(hit, (routes.send_offsets[routes.device] + ranks - 1)[:, None], 0).sum(-1)
  slots = jnp.where(holders < devices, slots, rows)  # [tokens, n]
  # And what each row is: the number of a pair of a token and a holder; `rows` is none.
  pair = jnp.full((rows,), rows).at[slots].set(jnp.arange(rows).reshape(slots.shape), mode="drop")
  source, to = pair // slots.shape[1], holders.reshape(rows).at[pair].get(mode="fill", fill_value=devices)
  chosen = indices.at[source].get(mode="fill", fill_value=experts)  # [rows, experts per token]
  local = jnp.where(chosen // each == to[:, None], chosen - to[:, None] * each, each)
  local, weights = compact_local_assignments(local, rows_at(weights, source, slots), each)  # [rows, n]
  # Whole numbers are exact in a float of this size.
  facts = jnp.concatenate([weights, local.astype(weights.dtype)], -1)
  move = functools.partial(
    ragged_all_to_all if has_ragged_all_to_all(device_kind()) else padded_all_to_all, most=tokens
  )
  of_tokens, of_gradients = fwd_and_dgrad_recipes(recipe)
  received, facts = dispatch((move, of_tokens), (x, facts), routes, source, slots)  # [room, embed], [room, 2 n]
  weights, local = jnp.split(facts, 2, -1)
  full = jnp.arange(room) < routes.send_sizes[:, routes.device].sum()
  y, lost = compute(received, jnp.where(full[:, None], local.astype(jnp.int32), each), weights, load, most)
  return combine((move, of_gradients), y, routes, source, slots), lost + lost_rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dispatch(how, rows, routes, source, slots):
  """(rows of x where their choices are [room, embed], the facts of each [room, n]) of `rows`: (x [tokens, embed], facts [rows, n]).

  Two messages: scales of FP8 are sent with the facts, in lanes that TPUs send anyway. Backward it is `combine`.

  how: (`ragged_all_to_all` or `padded_all_to_all`, recipe). source, slots: as in `rows_at`, of the rows that are sent.
  """
  (move, recipe), (x, facts) = how, rows
  values, scales = quantize_for_dispatch(recipe, x)
  values = move(rows_at(values, source, slots), routes)
  count, facts = facts.shape[1], jnp.concatenate([facts, rows_at(scales, source, slots).astype(facts.dtype)], 1)
  facts = move(facts, routes) if facts.shape[1] else facts
  return dequantize(recipe, values, facts[:, count:], x.dtype), facts[:, :count]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def combine(how, y, routes, source, slots):
  """For each token the sum of its rows of `y` [room, embed]: [tokens, embed]. Backward it is `dispatch` with `how`."""
  rows = how[0](y, routes, back=source.size)  # [rows, embed]
  return sums_at(rows, source, slots).astype(y.dtype)


def _dispatch_bwd(how, places, gradients):
  (dx, dfacts), (routes, source, _) = gradients, places
  return (combine(how, dx, *places), how[0](dfacts, routes, back=source.size)), None, None, None


def _combine_bwd(how, places, dy):
  none = jnp.zeros((places[1].size, 0), jnp.float32)
  return dispatch(how, (dy, none), *places)[0], None, None, None


dispatch.defvjp(lambda how, rows, *places: (dispatch(how, rows, *places), places), _dispatch_bwd)
combine.defvjp(lambda how, y, *places: (combine(how, y, *places), places), _combine_bwd)


def has_ragged_all_to_all(device_kind) -> bool:
  """Whether devices of this kind have the collective of `ragged_all_to_all`: CPUs do not, and libtpu refuses it on a v5e's torus."""
  return device_kind not in ("cpu", "TPU v5 lite", "TPU v5e")


def destination_devices(holders, devices):
  """The devices that each token goes to, each once: [tokens, n] for the least n that is enough, `devices` for none.

  `holders` [tokens, experts per token]: who has each choice, likewise.
  """
  per_token = holders.shape[1]
  if devices <= per_token:
    device = jnp.arange(devices)
    return jnp.where((holders[..., None] == device).any(1), device, devices)
  earlier = jnp.tril(jnp.ones((per_token, per_token), bool), -1)
  repeated = ((holders[:, :, None] == holders[:, None]) & earlier).any(-1)
  return jnp.where(repeated, devices, holders)


def compact_local_assignments(local, weights, each):
  """Of each row the choices that count, before those that do not: `local` [rows, n] with `each` for none, and weights.

  The n of the result is the least that is enough: a device has `each` experts, of which a token chooses each once.
  """
  width = min(local.shape[1], each)
  counts = local < each
  place = counts[..., None] & (jnp.cumsum(counts, 1)[..., None] - 1 == jnp.arange(width))  # [rows, before, after]
  moved = lambda x: jnp.where(place, x[..., None], 0).sum(1)
  return jnp.where(place.any(1), moved(local), each), moved(weights)


def make_all_to_all_plan(counts, room):
  """(AllToAllPlan, rows that overflowed this device's buffer) of devices that want to send `counts` [devices] rows to each."""
  (axis,), me = mesh_axes("experts"), axis_index("experts")
  wanted = jax.lax.all_gather(counts, axis)  # [source, destination]
  sent = jnp.clip(room - (jnp.cumsum(wanted, 0) - wanted), 0, wanted)
  routes = AllToAllPlan(sent, jnp.cumsum(wanted, 1) - wanted, jnp.cumsum(sent, 0) - sent, me, room, axis)
  return routes, (wanted - sent)[:, me].sum()


def padded_all_to_all(rows, routes, most, back=None):
  """`rows` [n, width] moved along `routes`, each pair of devices exchanging `most` rows: (`room` or `back` rows, width).

  `back`: the other way, rows that arrived to where they started.
  """
  devices, me = routes.send_sizes.shape[0], routes.device
  # Rows to and from each device, and where they begin among those sent and among those received.
  (there, starts), (here, arrivals) = (
    (routes.send_sizes[me], routes.send_offsets[me]),
    (routes.send_sizes[:, me], routes.recv_offsets[:, me]),
  )
  if back is not None:
    (there, starts), (here, arrivals) = (here, arrivals), (there, starts)
  place = jnp.arange(most)
  index = jnp.where(place < there[:, None], starts[:, None] + place, rows.shape[0])  # [devices, most]
  blocks = jax.lax.all_to_all(
    rows.at[index].get(mode="fill", fill_value=0), routes.axis, 0, 0
  )  # [devices, most, width]
  to = jnp.where(place < here[:, None], arrivals[:, None] + place, routes.recv_rows if back is None else back)
  empty = jnp.zeros((routes.recv_rows if back is None else back, rows.shape[1]), rows.dtype)
  return empty.at[to.reshape(devices * most)].set(blocks.reshape(devices * most, -1), mode="drop")


def ragged_all_to_all(rows, routes, most, back=None):
  """As `padded_all_to_all`, by the collective that sends as many rows as there are."""
  me, size = routes.device, routes.recv_rows if back is None else back
  there, here, starts, landing = (
    routes.send_sizes[me],
    routes.send_sizes[:, me],
    routes.send_offsets[me],
    routes.recv_offsets[me],
  )
  if back is not None:
    there, here, starts, landing = here, there, routes.recv_offsets[:, me], routes.send_offsets[:, me]
  empty, rows = vary(jnp.zeros((size, rows.shape[1]), rows.dtype), rows)
  return jax.lax.ragged_all_to_all(rows, empty, starts, there, landing, here, axis_name=routes.axis)
