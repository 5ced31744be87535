"""The sizes of expert buffers, by hand, and that the compiled layer has them."""

import jax
import jax.numpy as jnp

from deepseek_jax.model.dispatch import ragged
from deepseek_jax.model.expert_buffers import expert_buffers


def test_sizes():
  """The example of model/expert_parallel.py: 3 tokens, top-2, 2 devices with 2 experts each."""
  worst = expert_buffers(tokens=3, experts_per_token=2, num_experts=4, devices=2, buffer_factor=0)
  assert (worst.expected_assignments, worst.capacity) == (6, 12)
  assert (worst.send_rows, worst.recv_rows) == (6, 6)  # all 3 tokens of both devices go to one device
  even = expert_buffers(tokens=3, experts_per_token=2, num_experts=4, devices=2, buffer_factor=1)
  assert (even.capacity, even.send_rows, even.recv_rows) == (6, 6, 6)
  # A token goes to a device once, and its choices there are at most that device's experts.
  many = expert_buffers(tokens=10, experts_per_token=4, num_experts=16, devices=8, buffer_factor=0)
  assert (many.capacity, many.send_rows, many.recv_rows) == (160, 40, 80)
  assert expert_buffers(10, 4, 16, 8, buffer_factor=1.26).capacity == 50
  # Blocks are half a mean group: 4 of 10 rows in powers of two, at least 8.
  assert (many.block, many.sorted_rows) == (8, 160 + 2 * 8)
  assert expert_buffers(10, 4, 16, 1, buffer_factor=2).capacity == 40  # one device has no more than its tokens'


def test_dispatch_has_as_many_sorted_rows():
  buffers = expert_buffers(tokens=24, experts_per_token=2, num_experts=4, devices=1, buffer_factor=0)
  x, weights, indices = jnp.ones((24, 8)), jnp.ones((24, 2)), jnp.zeros((24, 2), jnp.int32)
  kernels = jnp.ones((4, 8, 5)), jnp.ones((4, 8, 5)), jnp.ones((4, 5, 8))
  sizes = buffers.expected_assignments, buffers.capacity
  jaxpr = jax.make_jaxpr(lambda *a: ragged(*a, *sizes, implementation="xla"))(x, indices, weights, *kernels)
  assert f"f32[{buffers.sorted_rows},8]" in str(jaxpr)
