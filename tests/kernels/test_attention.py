"""Attention by kernels against XLA's, forward and backward; they are interpreted on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from deepseek_jax.kernels.attention import pallas_tpu
from deepseek_jax.kernels.attention.api import attention, attention_of_part
from deepseek_jax.kernels.implementations import Unsupported
from deepseek_jax.model.context_parallel import zigzag

# batch, seq, heads, kv_heads, width of keys, of values
CASES = {
  "mla": (2, 128, 2, 2, 192, 128),
  "gqa in several blocks": (1, 384, 4, 2, 64, 64),
  "mqa": (1, 128, 3, 1, 24, 16),
}


def problem(name, dtype=np.float32):
  """q, k, v, a cotangent, segment_ids."""
  (batch, seq, heads, kv_heads, key, value), rng = CASES[name], np.random.default_rng(0)
  shapes = (heads, key), (kv_heads, key), (kv_heads, value), (heads, value)
  segments = np.sort(rng.integers(0, 4, (batch, seq)), 1).astype(np.int32)
  return [jnp.asarray(rng.normal(size=(batch, seq, *shape)), dtype) for shape in shapes], jnp.asarray(segments)


@functools.partial(jax.jit, static_argnames=("implementation", "window"))
def computed(q, k, v, dy, segments, implementation, window=0):
  """(y, dq, dk, dv)."""
  options = {"scale": 0.1, "segment_ids": segments, "window": window, "implementation": implementation}
  y, pull = jax.vjp(lambda q, k, v: attention(q, k, v, **options), q, k, v)
  return y, *pull(dy)


@pytest.mark.parametrize(
  ("name", "packed", "window"),
  [
    ("mla", True, 0),
    ("gqa in several blocks", True, 0),
    ("mqa", False, 0),
    ("gqa in several blocks", True, 100),
    ("mqa", False, 7),
  ],
)
def test_values_and_gradients(name, packed, window):
  arrays, segments = problem(name)
  segments = segments if packed else None
  ours, expected = (computed(*arrays, segments, implementation, window) for implementation in ("pallas_tpu", "xla"))
  for a, b in zip(ours, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_bfloat16_is_rounded_only_where_it_is_stored():
  """Of the four results, against float32: at most twice what rounding the operands and results makes inevitable."""
  arrays, segments = problem("mla", jnp.bfloat16)
  exact = computed(*(x.astype(jnp.float32) for x in arrays), segments, "xla")
  for a, b in zip(computed(*arrays, segments, "pallas_tpu"), exact, strict=True):
    assert a.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(a, np.float32) - b) < 2 * 2**-8 * np.linalg.norm(b)


def test_inside_shard_map_the_gradients_of_shared_keys_add_up():
  """As layers are: in a loop, and made again backward."""
  (q, k, v, dy), segments = problem("mla")
  mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
  shared = [x[:1] for x in (k, v)]

  def loss(q, shared, dy, segments, implementation):
    attended = functools.partial(attention, scale=0.1, segment_ids=segments, implementation=implementation)

    def layer(x, _):
      k, v = (jnp.broadcast_to(y, (x.shape[0], *y.shape[1:])) for y in shared)
      return x.at[..., : v.shape[-1]].add(attended(x, k, v)), None

    return (jax.lax.scan(jax.checkpoint(layer), q, None, length=2)[0][..., : dy.shape[-1]] * dy).sum()

  expected = jax.grad(loss, (0, 1))(q, shared, dy, segments, "xla")
  with jax.set_mesh(mesh):
    split, whole = jax.P("devices"), jax.P()
    put = lambda tree, spec: jax.device_put(tree, jax.NamedSharding(mesh, spec))
    local = lambda *arrays: jax.lax.psum(loss(*arrays, "pallas_tpu"), "devices")
    every = jax.shard_map(local, in_specs=(split, whole, split, split), out_specs=whole)
    gradients = jax.jit(jax.grad(every, (0, 1)))
    ours = gradients(put(q, split), put(shared, whole), put(dy, split), put(segments, split))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), ours, expected)


@pytest.mark.parametrize("window", [0, 100])
def test_parts_of_a_sequence_are_the_whole(window):
  """Three devices' queries, in two blocks or one; the part is traced, as a device's own number is."""
  (q, k, v, dy), segments = problem("gqa in several blocks")
  positions = zigzag(384, 3)

  @functools.partial(jax.jit, static_argnames="implementation")
  def of_part(q, k, v, dy, part, implementation):
    q_positions = jnp.asarray(positions)[part]
    select = lambda x: jnp.take(x, jnp.asarray(positions)[part], 1)
    options = {"scale": 0.1, "segment_ids": (segments[:, q_positions], segments), "window": window}
    options["implementation"] = implementation
    y, pull = jax.vjp(lambda q, k, v: attention_of_part(select(q), k, v, positions, part, **options), q, k, v)
    return jnp.zeros_like(dy).at[:, q_positions].set(y), *pull(select(dy))

  expected = computed(q, k, v, dy, segments, "xla", window)
  for implementation in ("xla", "pallas_tpu"):
    of_parts = [of_part(q, k, v, dy, part, implementation) for part in range(3)]
    for a, b in zip(map(sum, zip(*of_parts, strict=True)), expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_what_the_kernel_does_not_support_is_an_error():
  (q, k, v, _), _ = problem("mla")
  with pytest.raises(Unsupported, match="multiple of 128 positions on each device, not 100"):
    attention(q[:, :100], k[:, :100], v[:, :100], scale=1, implementation="pallas_tpu")
  with jax.enable_x64(True), pytest.raises(Unsupported, match="not float64"):
    attention(*(x.astype(jnp.float64) for x in (q, k, v)), scale=1, implementation="pallas_tpu")


def test_cost_counts_the_blocks_that_the_window_leaves():
  """Blocks of 128 keys for 128 queries: each sees its own, and the one before it."""
  full, windowed = (pallas_tpu._visible_blocks(1024, 1024, 128, 128, window) for window in (0, 100))
  assert (full, windowed) == (8 * 9 / 2, 8 + 7)
  assert pallas_tpu._visible_blocks(1024, 1024, 128, 128, 1024) == full
  assert pallas_tpu._splash_cost(100) is pallas_tpu._splash_cost(100)
