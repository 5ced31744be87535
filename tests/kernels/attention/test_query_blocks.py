"""Attention by blocks of queries against all scores at once, forward and backward, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from deepseek_jax.kernels.attention import query_blocks, xla

# seq, heads, kv_heads, width of keys, of values
SHAPES = {
  "mla, a last block of one query": (257, 2, 2, 24, 16),
  "gqa, blocks longer than the least": (1100, 4, 2, 8, 8),
}


def problem(shape, dtype=np.float64, batch=2):
  """q, k, v, a cotangent, and segments of which one begins inside a block."""
  (seq, heads, kv_heads, key, value), rng = SHAPES[shape], np.random.default_rng(0)
  shapes = (heads, key), (kv_heads, key), (kv_heads, value), (heads, value)
  arrays = [jnp.asarray(rng.normal(size=(batch, seq, *shape)), dtype) for shape in shapes]
  return arrays, jnp.asarray(np.sort(rng.integers(0, 3, (batch, seq)), 1), jnp.int32)


def values_and_gradients(attention, q, k, v, dy, segments, window):
  """(y, dq, dk, dv)."""
  y, pull = jax.vjp(lambda q, k, v: attention(q, k, v, segments, 0.3, window), q, k, v)
  return y, *pull(dy)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [0, 1, 100, 200])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, packed, window):
  with jax.enable_x64(True):
    arrays, segments = problem(shape)
    of = jax.jit(values_and_gradients, static_argnums=(0, 6))
    arguments = *arrays, segments if packed else None, window
    ours, expected = of(xla.attention, *arguments), of(xla.causal_dot_product_attention, *arguments)
    for a, b in zip(ours, expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_attention_of_xla_on_a_cpu_is_by_blocks(monkeypatch):
  (q, k, v, _), _ = problem("mla, a last block of one query", np.float32)
  monkeypatch.setattr(query_blocks, "attention", lambda *arguments: "blocks")
  assert xla.attention(q, k, v, None, 1.0, 0) == "blocks"
  assert xla.attention(q[:, :128], k[:, :128], v[:, :128], None, 1.0, 0).shape == (2, 128, 2, 16)


def test_no_scores_of_keys_that_no_query_of_a_block_sees():
  """Of 1,024 queries in 8 blocks: 36 of 64 pairs of blocks, and with a window of 129 two for each block but the first."""
  for window, pairs in ((0, 36), (129, 15)):
    blocks = list(query_blocks._blocks(1024, window))
    assert sum((rows.stop - rows.start) * (keys.stop - keys.start) for rows, keys in blocks) == pairs * 128**2


def test_bfloat16_is_rounded_only_where_it_is_stored():
  arrays, segments = problem("mla, a last block of one query", jnp.bfloat16)
  of = jax.jit(values_and_gradients, static_argnums=(0, 6))
  exact = of(xla.attention, *(x.astype(jnp.float32) for x in arrays), segments, 0)
  for a, b in zip(of(xla.attention, *arrays, segments, 0), exact, strict=True):
    assert a.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(a, np.float32) - b) < 2 * 2**-8 * np.linalg.norm(b)


def test_inside_shard_map_the_gradients_of_shared_keys_add_up():
  """As layers are: in a loop, and made again backward."""
  (q, k, v, dy), segments = problem("mla, a last block of one query", np.float32)
  mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
  shared = [x[:1] for x in (k, v)]

  def loss(q, shared, dy, segments):
    def layer(x, _):
      k, v = (jnp.broadcast_to(y, (x.shape[0], *y.shape[1:])) for y in shared)
      return x.at[..., : v.shape[-1]].add(xla.attention(x, k, v, segments, 0.1, 0)), None

    return (jax.lax.scan(jax.checkpoint(layer), q, None, length=2)[0][..., : dy.shape[-1]] * dy).sum()

  expected = jax.grad(loss, (0, 1))(q, shared, dy, segments)
  with jax.set_mesh(mesh):
    split, whole = jax.P("devices"), jax.P()
    put = lambda tree, spec: jax.device_put(tree, jax.NamedSharding(mesh, spec))
    local = lambda *arrays: jax.lax.psum(loss(*arrays), "devices")
    every = jax.shard_map(local, in_specs=(split, whole, split, split), out_specs=whole)
    gradients = jax.jit(jax.grad(every, (0, 1)))
    ours = gradients(put(q, split), put(shared, whole), put(dy, split), put(segments, split))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), ours, expected)
