"""All-to-all of rows over the expert axis: the plan of who sends how many, and two collectives, padded and ragged."""

import dataclasses

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.implementations import match_vma
from deepseek_jax.sharding import axis_index, mesh_axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AllToAllPlan:
  """How many rows each device sends to each, and where they are.

  Sizes and offsets are int32 [source, destination], replicated. At the source, rows are sorted by destination. At the
  destination, rows are sorted by source.
  """

  send_sizes: jax.Array  # rows that are sent; those that overflow are left out
  send_offsets: jax.Array  # index of the first of them at the source
  recv_offsets: jax.Array  # index of the first of them at the destination
  device: jax.Array  # [] int32: index of this device on the axis
  recv_rows: int = dataclasses.field(metadata={"static": True})  # size of the buffer at the destination
  axis: str = dataclasses.field(metadata={"static": True})  # mesh axis


def has_ragged_all_to_all(device_kind: str) -> bool:
  """Whether devices of this kind have `jax.lax.ragged_all_to_all`. CPUs do not; libtpu refuses it on a v5e's torus."""
  return device_kind not in ("cpu", "TPU v5 lite", "TPU v5e")


def make_all_to_all_plan(counts: jax.Array, recv_rows: int) -> tuple[AllToAllPlan, jax.Array]:
  """The plan of an all-to-all in which this device has `counts` int32 [devices] rows for each device.

  Returns the plan, and the number of rows [] that overflow this device's buffer of `recv_rows`.
  """
  (axis,), device = mesh_axes("experts"), axis_index("experts")
  requested_sizes = jax.lax.all_gather(counts, axis)  # [source, destination]
  send_offsets = jnp.cumsum(requested_sizes, 1) - requested_sizes
  send_sizes = jnp.clip(recv_rows - (jnp.cumsum(requested_sizes, 0) - requested_sizes), 0, requested_sizes)
  recv_offsets = jnp.cumsum(send_sizes, 0) - send_sizes
  plan = AllToAllPlan(send_sizes, send_offsets, recv_offsets, device, recv_rows, axis)
  return plan, (requested_sizes - send_sizes)[:, device].sum()


def padded_all_to_all(rows: jax.Array, plan: AllToAllPlan, max_rows: int, return_rows: int | None = None) -> jax.Array:
  """Sends `rows` [n, width] by `plan`; each pair of devices exchanges `max_rows` rows, most of them padding.

  return_rows: send in the opposite direction, from destinations to sources, where the result has this many rows.

  Returns [plan.recv_rows or return_rows, width].
  """
  devices, device = plan.send_sizes.shape[0], plan.device
  # Rows to and from each device, and the index of the first of them here.
  send_sizes, send_offsets = plan.send_sizes[device], plan.send_offsets[device]
  recv_sizes, recv_offsets = plan.send_sizes[:, device], plan.recv_offsets[:, device]
  out_rows = plan.recv_rows
  if return_rows is not None:
    send_sizes, send_offsets, recv_sizes, recv_offsets = recv_sizes, recv_offsets, send_sizes, send_offsets
    out_rows = return_rows
  row = jnp.arange(max_rows)
  index = jnp.where(row < send_sizes[:, None], send_offsets[:, None] + row, rows.shape[0])  # [devices, max_rows]
  blocks = rows.at[index].get(mode="fill", fill_value=0)
  blocks = jax.lax.all_to_all(blocks, plan.axis, 0, 0)  # [devices, max_rows, width]
  index = jnp.where(row < recv_sizes[:, None], recv_offsets[:, None] + row, out_rows)
  out = jnp.zeros((out_rows, rows.shape[1]), rows.dtype)
  return out.at[index.reshape(devices * max_rows)].set(blocks.reshape(devices * max_rows, -1), mode="drop")


def ragged_all_to_all(rows: jax.Array, plan: AllToAllPlan, max_rows: int, return_rows: int | None = None) -> jax.Array:
  """As `padded_all_to_all`, by the collective that sends no padding. `max_rows` is not used."""
  device = plan.device
  send_sizes, recv_sizes = plan.send_sizes[device], plan.send_sizes[:, device]
  input_offsets, output_offsets = plan.send_offsets[device], plan.recv_offsets[device]  # here; at the destinations
  out_rows = plan.recv_rows
  if return_rows is not None:
    send_sizes, recv_sizes = recv_sizes, send_sizes
    input_offsets, output_offsets = plan.recv_offsets[:, device], plan.send_offsets[:, device]
    out_rows = return_rows
  out, rows = match_vma(jnp.zeros((out_rows, rows.shape[1]), rows.dtype), rows)
  return jax.lax.ragged_all_to_all(
    rows, out, input_offsets, send_sizes, output_offsets, recv_sizes, axis_name=plan.axis
  )
