"""Expert parallelism gives what one device computes, and sends each token to a device at most once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config_sections import MeshConfig
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model import expert_parallel
from deepseek_jax.model.dispatch import DISPATCH
from deepseek_jax.sharding import psum, pvary, spec, spmd

pytestmark = pytest.mark.jax_version

TOKENS, EXPERTS, CHOSEN, EMBED, MLP = 12, 8, 3, 4, 5  # tokens of each of 4 devices


def problem(seed=0, skewed=False):
  """x, indices (8 is no expert) and weights of 48 tokens, and kernels."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(4 * TOKENS, EXPERTS)) + (9 * (np.arange(EXPERTS) < CHOSEN) if skewed else 0)
  indices = np.argsort(-logits, -1)[:, :CHOSEN]
  if not skewed:
    indices = np.where(rng.random(indices.shape) < 0.2, EXPERTS, indices)
  shapes = (EXPERTS, EMBED, MLP), (EXPERTS, EMBED, MLP), (EXPERTS, MLP, EMBED)
  kernels = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
  x, weights = rng.normal(size=(4 * TOKENS, EMBED)), rng.uniform(0.1, 1, size=indices.shape)
  return jnp.asarray(x), jnp.asarray(indices, jnp.int32), jnp.asarray(weights), *kernels


def on_four_devices(function, arrays, outputs):
  """`function` of (x, indices, weights, gate, up, down) with tokens and experts shared by four devices."""
  with jax.set_mesh(make_mesh(MeshConfig(data=1, expert=4))):
    layout = (spec("batch", None),) * 3 + (spec("experts", None, None),) * 3
    placed = jax.device_put(arrays, layout)
    return jax.block_until_ready(jax.jit(spmd(function, layout, outputs(spec)))(*placed))


def routed(x, indices, weights, *kernels, buffer_factor=0.0):
  def compute(x, indices, weights, expected_assignments, capacity):
    return DISPATCH["ragged"](x, indices, weights, *kernels, expected_assignments, capacity)

  y, overflow = expert_parallel.expert_parallel(x, indices, weights, EXPERTS, compute, buffer_factor)
  return y, psum(overflow, "experts")


@pytest.mark.parametrize("skewed", [False, True])
def test_equal_to_one_device_with_gradients(skewed):
  with jax.enable_x64(True):
    arrays = problem(skewed=skewed)

    def share(x, weights, kernels, indices):
      return jnp.sin(routed(x, indices, weights, *kernels)[0]).sum()

    def gradients(x, indices, weights, *kernels):
      x, indices, weights, kernels = pvary((x, indices, weights, kernels))
      y, _ = routed(x, indices, weights, *kernels)
      return y, jax.grad(share, (0, 1, 2))(x, weights, kernels, indices)

    tokens = lambda spec: spec("batch", None)
    kernels = lambda spec: (spec("experts", None, None),) * 3
    y, ours = on_four_devices(gradients, arrays, lambda s: (tokens(s), (tokens(s), tokens(s), kernels(s))))

    def dense(x, weights, kernels):
      return DISPATCH["dense"](x, arrays[1], weights, *kernels, 0, 0)[0]

    wanted = arrays[0], arrays[2], tuple(arrays[3:])
    expected = jax.jit(jax.grad(lambda *a: jnp.sin(dense(*a)).sum(), (0, 1, 2)))(*wanted)
    np.testing.assert_allclose(y, jax.jit(dense)(*wanted), rtol=1e-12, atol=1e-13)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13), ours, expected)


def test_overflow_of_a_small_buffer_is_counted_and_a_large_one_changes_nothing():
  with jax.enable_x64(True):
    arrays, overflow = (
      problem(skewed=True),
      {},
    )  # all 144 assignments are to experts 0, 1 and 2, on the first two devices
    for factor in (1.0, 1.5, 4.0):
      run = functools.partial(routed, buffer_factor=factor)
      y, overflow[factor] = on_four_devices(run, arrays, lambda s: (s("batch", None), s()))
    # 36 assignments are an even load: devices 0 and 1 have 96 and 48, which arrived in 48 rows each.
    assert {factor: int(n) for factor, n in overflow.items()} == {1.0: overflow[1.0], 1.5: 42, 4.0: 0}
    assert overflow[1.0] > 42
    np.testing.assert_allclose(y, on_four_devices(routed, arrays, lambda s: (s("batch", None), s()))[0], rtol=1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_each_token_is_sent_at_most_once_to_a_device(monkeypatch, seed):
  sent, make_plan = [], expert_parallel.make_all_to_all_plan

  def watched(counts, recv_rows):
    plan, overflow = make_plan(counts, recv_rows)
    jax.debug.callback(lambda send_sizes: sent.append(np.asarray(send_sizes)), plan.send_sizes)
    return plan, overflow

  monkeypatch.setattr(expert_parallel, "make_all_to_all_plan", watched)
  arrays = problem(seed)
  on_four_devices(routed, arrays, lambda s: (s("batch", None), s()))
  jax.effects_barrier()
  device = np.asarray(arrays[1]).reshape(4, TOKENS, CHOSEN) // (EXPERTS // 4)
  wanted = [[sum(to in token for token in tokens) for to in range(4)] for tokens in device]
  assert len(sent) == 4 and all((sizes == wanted).all() for sizes in sent)
  assert np.sum(wanted) < (device < 4).sum()  # some tokens chose two experts of one device
