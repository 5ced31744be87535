"""Sizes of the buffers of expert parallelism and dispatch, one for every step. The model and the plan ask here."""

import dataclasses

from deepseek_jax.kernels.grouped_matmul.api import block_rows


@dataclasses.dataclass(frozen=True)
class ExpertBuffers:
  """Of one device, in a microbatch of an MoE layer.

  Attributes:
    expected_assignments: assignments of its experts under an even load.
    capacity: assignments of its experts that count; those beyond overflow.
    send_rows: rows that it sends: for each token one to each device that the token may go to.
    recv_rows: rows that it receives.
    block: the rows of an expert are padded to a multiple of it (`ragged` in model/dispatch.py).
    sorted_rows: rows of the grouped matmuls, padding included.
  """

  expected_assignments: int
  capacity: int
  send_rows: int
  recv_rows: int
  block: int
  sorted_rows: int


def expert_buffers(
  tokens: int, experts_per_token: int, num_experts: int, devices: int, buffer_factor: float
) -> ExpertBuffers:
  """The buffers of a device that has `tokens` tokens, in expert parallelism of `devices`.

  buffer_factor: capacity as a multiple of an even load. 0: the worst case, every token of every device.
  """
  local_experts = num_experts // devices
  expected_assignments = tokens * experts_per_token
  capacity = devices * tokens * min(experts_per_token, local_experts)
  if buffer_factor:
    capacity = min(capacity, int(buffer_factor * expected_assignments))
  send_rows, recv_rows = tokens * min(devices, experts_per_token), min(devices * tokens, capacity)
  layout = sorted_layout(expected_assignments, capacity, local_experts)
  return ExpertBuffers(expected_assignments, capacity, send_rows, recv_rows, *layout)


def sorted_layout(expected_assignments: int, capacity: int, num_experts: int) -> tuple[int, int]:
  """(block, sorted_rows) of `num_experts` experts of a device, as in ExpertBuffers."""
  block = block_rows(expected_assignments, num_experts)
  return block, -(-capacity // block) * block + num_experts * block
