"""Context parallelism: the attention of one device to the whole sequence, in equal work, by the collectives it says."""

import collections
import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from deepseek_jax.config_sections import MeshConfig
from deepseek_jax.kernels.implementations import Unsupported
from deepseek_jax.mesh import abstract_mesh
from deepseek_jax.model.attention import attention_with_dropout, causal_self_attention
from deepseek_jax.model.context_parallel import (
  KV_COMM,
  OWN_PAIRS,
  all_gather_kv_attention,
  chunk_pairs,
  context_parallel_attention,
  zigzag,
)
from deepseek_jax.model_config import AttentionConfig
from deepseek_jax.sharding import spec, spmd

pytestmark = pytest.mark.jax_version

BATCH, SEQ, HEADS, KV_HEADS, WIDTH, ROPE = 2, 32, 4, 2, 6, 2
SHARED = jax.P("data", "context")
KINDS = pytest.mark.parametrize("kind", KV_COMM)
# What a kernel's place in the model is given, with XLA's products in that place.
FORMS = {kind: functools.partial(context_parallel_attention, kind=kind) for kind in KV_COMM}
FORMS["kernel"] = functools.partial(all_gather_kv_attention, implementation="xla")


def gqa(weights, keys):
  """Keys and values that travel as they are; two factors stand for weights."""
  return keys[0] * weights[0], keys[1] * weights[1]


def mla(weights, keys):
  """Keys of a latent and of what all heads share, as in MLA; values are narrower."""
  k, v = jnp.split(jnp.einsum("bsc,chk->bshk", keys[0], weights), [WIDTH - ROPE], -1)
  return jnp.concatenate([k, jnp.broadcast_to(keys[1][:, :, None], (*k.shape[:3], ROPE))], -1), v


# (expand, shapes of the keys at a position, shape of the weights, value width)
ATTENTIONS = {
  "gqa": (gqa, ((KV_HEADS, WIDTH), (KV_HEADS, WIDTH)), (2,), WIDTH),
  "mla": (mla, ((7,), (ROPE,)), (7, HEADS, WIDTH - ROPE + 5), 5),
}


def inputs(name, dtype=np.float64, seq=SEQ):
  """((q, keys, weights), segment_ids, cotangents of the result); logits of order 10, segments that end anywhere."""
  _, keys, weights, value_width = ATTENTIONS[name]
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.normal(size=shape).astype(dtype)

  q = 4 * normal(BATCH, seq, HEADS, WIDTH)
  primals = (q, tuple(normal(BATCH, seq, *shape) for shape in keys), normal(*weights))
  segments = np.sort(rng.integers(0, 5, (BATCH, seq)), 1).astype(np.int32)
  return primals, segments, normal(BATCH, seq, HEADS, value_width)


def mesh_of(parts):
  return jax.make_mesh((4 // parts, parts), ("data", "context"), axis_types=(AxisType.Explicit,) * 2)


def pulled_back(attention, primals, cotangents):
  """(values, gradients of the primals)."""
  y, pull = jax.vjp(attention, *primals)
  return y, pull(cotangents)


def shared(name, kind, backward=True, window=0):
  """The program of all devices: (primals, segment_ids, cotangents) to (values, gradients), or to values alone."""

  def attention(segment_ids, q, keys, weights):
    expand = functools.partial(ATTENTIONS[name][0], weights)
    return FORMS[kind](q, keys, expand, scale=0.5, axis="context", segment_ids=segment_ids, window=window)

  def program(primals, segment_ids, cotangents):
    q, keys, weights = primals
    primals = (q, keys, jax.lax.pcast(weights, ("data", "context"), to="varying"))
    if not backward:
      return attention(segment_ids, *primals)
    y, (*gradients, weights) = pulled_back(functools.partial(attention, segment_ids), primals, cotangents)
    return y, (*gradients, jax.lax.psum(weights, ("data", "context")))

  layout = (SHARED, SHARED, jax.P())
  out = (SHARED, layout) if backward else SHARED
  return jax.jit(jax.shard_map(program, in_specs=(layout, SHARED, SHARED), out_specs=out))


def permuted(tree, order, sharding=None):
  """Arrays [batch, seq, ...] with their positions in another order, on the devices of `sharding`."""
  tree = jax.tree.map(lambda x: np.asarray(x)[:, order], tree)
  return jax.device_put(tree, sharding) if sharding else tree


@functools.cache
def alone(name, dtype, packed, window=0):
  """(values, gradients) of `attention_with_dropout` on one device."""
  primals, segments, cotangents = inputs(name, dtype)

  def attention(q, keys, weights):
    expanded = ATTENTIONS[name][0](weights, keys)
    return attention_with_dropout(q, *expanded, scale=0.5, segment_ids=segments if packed else None, window=window)

  return jax.jit(functools.partial(pulled_back, attention))(primals, cotangents)


def both(name, kind, parts, dtype=np.float64, packed=True, window=0):
  """(values, gradients) of shared sequences, back in their order, and those of `alone`."""
  (q, keys, weights), segments, cotangents = inputs(name, dtype)
  order, mesh = zigzag(SEQ, parts).reshape(-1), mesh_of(parts)
  with jax.set_mesh(mesh):
    put = functools.partial(permuted, order=order, sharding=jax.NamedSharding(mesh, SHARED))
    weights = jax.device_put(weights, jax.NamedSharding(mesh, jax.P()))
    arguments = ((*put((q, keys)), weights), put(segments if packed else None), put(cotangents))
    y, (*gradients, of_weights) = jax.block_until_ready(shared(name, kind, window=window)(*arguments))
  y, gradients = permuted((y, gradients), np.argsort(order))
  return (y, (*gradients, of_weights)), alone(name, dtype, packed, window)


def assert_equal(found, expected, tolerance):
  """To `tolerance` of each array's largest element."""

  def leaf(x, y):
    assert x.dtype == y.dtype
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())

  jax.tree.map(leaf, found, expected)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize(
  "name, parts, packed", [("gqa", 2, True), ("gqa", 4, False), ("mla", 2, False), ("mla", 4, True)]
)
def test_values_and_gradients_are_those_of_the_whole_sequence(name, parts, packed, kind):
  with jax.enable_x64(True):
    assert_equal(*both(name, kind, parts, packed=packed), 1e-12)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("name, window, packed", [("gqa", 3, True), ("mla", 13, False)])  # within a chunk, and beyond
def test_with_a_sliding_window(name, window, packed, kind):
  with jax.enable_x64(True):
    assert_equal(*both(name, kind, 4, packed=packed, window=window), 1e-12)


@KINDS
def test_in_float32(kind):
  assert_equal(*both("mla", kind, 4, np.float32), 2e-5)


def test_a_device_holds_an_early_and_a_late_chunk():
  np.testing.assert_array_equal(zigzag(8, 2), [[0, 1, 6, 7], [2, 3, 4, 5]])
  np.testing.assert_array_equal(zigzag(5, 1), [[0, 1, 2, 3, 4]])
  assert zigzag(8, 2).dtype == np.int32
  with pytest.raises(ValueError, match="divisible by 8"):
    zigzag(20, 4)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_devices_share_the_causal_pairs_equally(parts):
  chunks = zigzag(2 * parts, parts) if parts > 1 else np.array([[0, 1]])
  found = []
  for device in range(parts):
    pairs = [(chunks[device][q], chunks[device][k]) for q, k in OWN_PAIRS]
    for source in set(range(parts)) - {device}:
      pairs += [(chunks[device][q], chunks[source][k]) for q, k in chunk_pairs(source, device)]
    assert len(pairs) == 2 * parts + 1
    found += pairs
  assert sorted(found) == [(q, k) for q in range(2 * parts) for k in range(q + 1)]


def executions(jaxpr, times=1):
  """Each equation, with how often it is executed."""
  for equation in jaxpr.eqns:
    yield equation, times
    for inner in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
      if hasattr(inner, "eqns"):
        yield from executions(inner, times * equation.params.get("length", 1))


def executed(name, kind, parts, backward):
  """(products in matrix multiplications of a device, {primitive: how often}), of the program as it is traced."""
  mesh = mesh_of(parts)
  with jax.set_mesh(mesh):
    jaxpr = shared(name, kind, backward).trace(*abstract(name, mesh)).jaxpr
  products, primitives = 0, collections.Counter()
  for equation, times in executions(jaxpr):
    if equation.primitive.name == "dot_general":
      contracting = equation.params["dimension_numbers"][0][0]
      inner = math.prod(equation.invars[0].aval.shape[dimension] for dimension in contracting)
      products += times * inner * equation.outvars[0].aval.size
    primitives[equation.primitive.name] += times
  return products, primitives


def abstract(name, mesh, seq=SEQ):
  """Shapes and layouts of what `shared` takes."""
  (q, keys, weights), segments, cotangents = inputs(name, np.float32, seq)

  def leaf(x, spec=SHARED):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

  q, keys, segments, cotangents = jax.tree.map(leaf, (q, keys, segments, cotangents))
  return (q, keys, leaf(weights, jax.P())), segments, cotangents


@KINDS
@pytest.mark.parametrize("parts", [2, 4])
def test_only_the_causal_half_is_multiplied(parts, kind):
  pair = BATCH * parts // 4 * HEADS * (SEQ // (2 * parts)) ** 2
  per_device = pair * (2 * parts + 1)
  assert executed("gqa", kind, parts, backward=False)[0] == per_device * 2 * WIDTH
  # Backward: the logits again, and four products. Without checkpoints it would be 6 in all.
  assert executed("gqa", kind, parts, backward=True)[0] == per_device * 7 * WIDTH


@pytest.mark.parametrize("parts", [2, 4])
def test_keys_hop_once_for_each_other_device(parts):
  assert executed("mla", "ring", parts, backward=False)[1]["ppermute"] == 3 * (parts - 1)  # keys and segment_ids
  assert executed("mla", "ring", parts, backward=True)[1]["ppermute"] == 5 * (parts - 1)  # and gradients of keys


def collectives(kind):
  """{collective: number of times that it stands in the compiled program, forward and backward}."""
  mesh = mesh_of(4)
  with jax.set_mesh(mesh):
    text = shared("mla", kind).lower(*abstract("mla", mesh)).compile().as_text()
  return collections.Counter(
    re.findall(r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(", text)
  )


def test_gather_is_one_collective_an_array():
  # Two arrays of keys and the segment_ids; gradients of the keys; those of the weights, by this test.
  assert collectives("gather") == {"all-gather": 3, "reduce-scatter": 2, "all-reduce": 1}


def test_ring_gathers_nothing():
  assert set(collectives("ring")) == {"collective-permute", "all-reduce"}


@KINDS
def test_scores_and_sums_of_pairs_are_not_kept(kind):
  kept, parts, length = [], 4, 8

  def program(q, keys):
    attention = functools.partial(
      context_parallel_attention, expand_kv=lambda kv: kv, scale=0.5, axis="context", kind=kind
    )
    y, pull = jax.vjp(attention, q, keys)
    kept.extend(x.aval for x in jax.tree.leaves(pull) if jnp.issubdtype(x.dtype, jnp.floating))
    return y

  mesh = mesh_of(parts)
  with jax.set_mesh(mesh):
    (q, keys, _), *_ = abstract("gqa", mesh, 2 * parts * length)
    jax.jit(jax.shard_map(program, in_specs=(SHARED, SHARED), out_specs=SHARED)).trace(q, keys)
  assert not [x for x in kept if x.shape[-2:] == (length, length)]
  rows = BATCH * 2 * length * (2 * HEADS + parts * 2 * KV_HEADS)  # once: q, the result's sum, all keys and values
  assert sum(x.size for x in kept if x.shape[-1] == WIDTH) == rows * WIDTH


@pytest.mark.parametrize(("implementation", "length"), [("auto", 96), ("auto", 128), ("pallas", 96)])
def test_on_tpus_the_kernel_is_taken_where_it_does_the_shapes(implementation, length):
  """And else the pairs of chunks, which hold no scores of the whole sequence."""
  config = AttentionConfig(heads=HEADS, kv_heads=HEADS, head_dim=8, implementation=implementation)
  mesh = abstract_mesh(MeshConfig(data=1, context=2), jax.sharding.AbstractDevice("TPU v5", 1, "tpu"))

  def local(x):  # [1, length, heads, 8]
    tokens = types.SimpleNamespace(segment_ids=None)
    return causal_self_attention(x, (x, x), lambda kv: kv, 1.0, config, tokens, None)

  with jax.sharding.use_abstract_mesh(mesh):
    layout = spec("batch", "seq", None, None)
    x = jax.ShapeDtypeStruct((1, 2 * length, HEADS, 8), jnp.bfloat16, sharding=jax.NamedSharding(mesh, layout))
    trace = jax.make_jaxpr(spmd(local, layout, layout))
    if implementation == "pallas":
      with pytest.raises(Unsupported, match="multiple of 128 positions on each device, not 96"):
        trace(x)
      return
    text = str(trace(x))
  assert ("splash" in text) == (length == 128)
  if length == 96:  # scores of the whole sequence, and of a pair
    assert "96,192]" not in text and "48,48]" in text
