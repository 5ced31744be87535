"""The model against a plain float64 NumPy reference, and its parts against what defines them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config_sections import MeshConfig
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.attention import attention_with_dropout
from deepseek_jax.model.hash_router import hash_experts
from deepseek_jax.model.transformer import graphdef, init_params
from deepseek_jax.model_config import AttentionConfig, MoEConfig
from deepseek_jax.training.loss import cross_entropy
from tests.configs import DENSE, HASH_MOE

TINY = dataclasses.replace(
  DENSE,
  embed=24,
  layers=3,
  mlp=40,
  init_std=0.2,
  remat="none",
  attention=AttentionConfig(heads=6, kv_heads=2, head_dim=8),
)


@pytest.fixture(autouse=True)
def one_device():
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    yield


def tokens(batch=2, seq=11, vocab=64):
  return np.random.default_rng(0).integers(0, vocab, (batch, seq))


def random_params(config, seed=0):
  """Initial parameters with norm scales that are not 1."""
  params, _ = init_params(config, jax.random.key(seed))
  rng = np.random.default_rng(seed)
  return jax.tree.map_with_path(
    lambda path, p: jnp.asarray(rng.uniform(0.5, 1.5, p.shape), p.dtype) if path[-1].key == "scale" else p, params
  )


def ahead(ids, depths):
  """[depth, batch, seq]: `ids` one, two, ... positions on; -1 past the end."""
  return jnp.stack([jnp.pad(ids[:, k:], ((0, 0), (0, k)), constant_values=-1) for k in range(1, depths + 1)])


def logits_of(config, params, ids, batch_context=None, **kwargs):
  def forward(params, ids):
    model = nnx.merge(graphdef(config), params, {})
    return model.logits(model(ids, model.batch_context(ids, **(batch_context or {})), **kwargs)[0])

  return np.asarray(jax.jit(forward)(params, jnp.asarray(ids)))


def reference(config, params, ids, positions=None, same=None):
  """Logits in float64, written from the papers' formulas, one head at a time."""
  p, a = jax.tree.map(lambda x: np.asarray(x, np.float64), params), config.attention
  x = p["embed"][ids]
  batch, seq, _ = x.shape
  positions = np.broadcast_to(np.arange(seq), (batch, seq)) if positions is None else positions
  mask = np.tril(np.ones((seq, seq), bool))[None] & (True if same is None else same)

  def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale

  def rope(x):  # [batch, seq, head_dim], as complex rotation of the pairs (i, i + head_dim / 2)
    half = a.head_dim // 2
    angle = positions[..., None] * a.rope_theta ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)

  for i in range(config.layers):
    layer = jax.tree.map(lambda w, i=i: w[i], p["dense_layers"])
    h, y = norm(x, layer["attn_norm"]["scale"]), 0
    for head in range(a.heads):
      kv = head // (a.heads // a.kv_heads)
      q, k = rope(h @ layer["attn"]["q"]["kernel"][:, head]), rope(h @ layer["attn"]["k"]["kernel"][:, kv])
      scores = np.where(mask, q @ k.swapaxes(1, 2) / np.sqrt(a.head_dim), -np.inf)
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      weights /= weights.sum(-1, keepdims=True)
      y = y + weights @ (h @ layer["attn"]["v"]["kernel"][:, kv]) @ layer["attn"]["o"]["kernel"][head]
    x = x + y
    h, m = norm(x, layer["mlp_norm"]["scale"]), layer["mlp"]
    gate = h @ m["gate"]["kernel"]
    x = x + (gate / (1 + np.exp(-gate)) * (h @ m["up"]["kernel"])) @ m["down"]["kernel"]
  return norm(x, p["final_norm"]["scale"]) @ p["head"]["kernel"]


@pytest.mark.parametrize("kv_heads", [1, 2, 6])  # MQA, GQA, MHA
def test_logits_equal_the_reference(kv_heads):
  config = dataclasses.replace(TINY, attention=dataclasses.replace(TINY.attention, kv_heads=kv_heads))
  params = random_params(config)
  np.testing.assert_allclose(
    logits_of(config, params, tokens()), reference(config, params, tokens()), rtol=1e-4, atol=1e-4
  )


def test_float64_throughout():
  config = dataclasses.replace(TINY, param_dtype="float64", compute_dtype="float64")
  with jax.enable_x64(True):
    params = random_params(config)
    logits = logits_of(config, params, tokens())
  assert logits.dtype == np.float64
  np.testing.assert_allclose(logits, reference(config, params, tokens()), rtol=1e-11, atol=1e-12)


def test_documents_do_not_see_each_other():
  params, ids = random_params(TINY), tokens()
  starts = np.zeros(ids.shape, bool)
  starts[0, 4] = starts[1, [0, 7]] = True
  segments = np.cumsum(starts, 1)
  positions = np.stack([[j - max([0, *np.flatnonzero(row[: j + 1])]) for j in range(len(row))] for row in starts])
  same = segments[:, :, None] == segments[:, None, :]
  ours = logits_of(TINY, params, ids, {"rope_positions": jnp.asarray(positions), "segment_ids": jnp.asarray(segments)})
  np.testing.assert_allclose(ours, reference(TINY, params, ids, positions, same), rtol=1e-4, atol=1e-4)
  assert np.abs(ours - logits_of(TINY, params, ids)).max() > 1e-2


MTP = dataclasses.replace(TINY, num_mtp_layers=2)


def test_multi_token_prediction_stays_within_documents():
  params, ids, segments = random_params(MTP), tokens(batch=1, seq=8), jnp.array([[0, 0, 0, 0, 1, 1, 1, 1]])

  def depths(ids):
    model = nnx.merge(graphdef(MTP), params, {})
    batch_context = model.batch_context(ids, segment_ids=segments)
    hidden, _ = model(ids, batch_context)
    return [h for h, _ in model.mtp(hidden, ahead(ids, 2), batch_context)]

  other = ids.copy()
  other[0, 3] += 1  # the last token of the first document
  for depth, (ours, moved) in enumerate(zip(depths(jnp.asarray(ids)), depths(jnp.asarray(other)), strict=True), 1):
    differs = np.abs(np.asarray(ours - moved)).max(-1)[0, : 8 - depth] > 0
    # Position i has seen tokens 0 .. i + depth of its document, and later ones of the next.
    assert differs.tolist() == [3 - depth <= i <= 3 for i in range(8 - depth)]


CAPACITY = dataclasses.replace(
  TINY, layers=2, num_mtp_layers=1,
  moe=MoEConfig(
    num_routed_experts=4, num_experts_per_token=2, mlp=8, num_expert_groups=2, topk_groups=2, dispatch="capacity",
    capacity_factor=0.5, no_drop_fraction=0.25,
  ),
)  # fmt: skip


def test_capacity_drops_in_training_only_and_exempts_the_same_sequences_in_every_layer():
  params, ids = random_params(CAPACITY), jnp.asarray(tokens(batch=32))

  @functools.partial(jax.jit, static_argnames="dispatch")
  def outputs(key, dispatch):
    moe = dataclasses.replace(CAPACITY.moe, dispatch=dispatch)
    model = nnx.merge(graphdef(dataclasses.replace(CAPACITY, moe=moe)), params, {})
    batch_context = model.batch_context(ids, no_drop_key=key)
    hidden, _ = model(ids, batch_context, dropout_key=key)
    return hidden, model.mtp(hidden, ahead(ids, 1), batch_context, dropout_key=key)[0][0][:, :-1]

  dropless, evaluated = outputs(None, "ragged"), outputs(None, "capacity")
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), dropless, evaluated)
  trained = outputs(jax.random.key(3), "capacity")
  main, mtp = (np.abs(np.asarray(a - b)).max((1, 2)) < 1e-4 for a, b in zip(dropless, trained, strict=True))
  np.testing.assert_array_equal(main, mtp)  # nothing dropped in two layers and in that of multi-token prediction
  assert 3 <= main.sum() <= 13, main.sum()  # about a quarter of 32


def test_a_hash_router_gets_the_ids_of_the_tokens_that_a_depth_adds():
  moe = dataclasses.replace(HASH_MOE, num_shared_experts=0, dispatch="dense")
  config = dataclasses.replace(MTP, layers=1, num_mtp_layers=1, moe=moe)
  ids, (params, _) = jnp.asarray(tokens()), jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))

  @jax.jit
  def chosen(ids):
    model, indices = nnx.merge(graphdef(config), params, {}), lambda output: output.aux["routing"].indices
    hidden, main = model(ids, aux_fn=indices)
    return main["moe_layers"][0], model.mtp(hidden, ahead(ids, 1), model.batch_context(ids), aux_fn=indices)[0][1]

  main, mtp = chosen(ids)
  experts = np.asarray(hash_experts(ids, 8, 3))
  np.testing.assert_array_equal(main, experts)
  np.testing.assert_array_equal(mtp[:, :-1], experts[:, 1:])
  assert (mtp[:, -1] == 8).all()  # no experts past the end


@pytest.mark.parametrize("remat", ["full", "dots", "offload"])
def test_remat_changes_no_gradient(remat):
  params, ids = random_params(TINY), jnp.asarray(tokens())

  def gradient(config):
    def loss(params):
      model = nnx.merge(graphdef(config), params, {})
      return jnp.square(model.logits(model(ids)[0])).mean()

    return jax.jit(jax.grad(loss))(params)

  expected, ours = gradient(TINY), gradient(dataclasses.replace(TINY, remat=remat))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), expected, ours)


def test_bfloat16_compute_stays_near_float32_and_logits_are_float32():
  params = random_params(TINY)
  half = logits_of(dataclasses.replace(TINY, compute_dtype="bfloat16"), params, tokens())
  full = logits_of(TINY, params, tokens())
  assert half.dtype == np.float32
  assert 1e-4 < np.abs(half - full).max() / np.abs(full).max() < 0.05


def test_initial_parameters():
  config = dataclasses.replace(TINY, embed=128, mlp=512, init_std=0.006)
  params, buffers = init_params(config, jax.random.key(1))
  assert buffers == {}
  for path, p in jax.tree.leaves_with_path(params):
    assert p.dtype == jnp.float32
    if path[-1].key == "scale":
      assert (p == 1).all()
    else:
      assert abs(float(p.std()) / 0.006 - 1) < 0.03, path
  q = params["dense_layers"]["attn"]["q"]["kernel"]
  assert not np.allclose(q[0], q[1])


def dot_precisions(jaxpr):
  """(dtype of the operands, precision) of all products in a jaxpr and the jaxprs inside it."""
  found = set()
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      found.add((eqn.invars[0].aval.dtype.name, eqn.params["precision"]))
    for value in eqn.params.values():
      if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
        found |= dot_precisions(getattr(value, "jaxpr", value))
  return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_products_are_full_precision_on_every_chip_forward_and_backward(dtype):
  """In a bfloat16 model they are the router's."""
  moe = MoEConfig(num_routed_experts=4, num_experts_per_token=2, mlp=8)
  config = dataclasses.replace(TINY, compute_dtype=dtype, remat="full", first_dense_layers=1, moe=moe)

  def loss(params, ids):
    model = nnx.merge(graphdef(config), params, {})
    return cross_entropy(model.output_embedding(), model(ids)[0], ids, 4)[1]

  jaxpr = jax.make_jaxpr(jax.grad(loss))(random_params(config), jnp.asarray(tokens()))
  full, found = (jax.lax.Precision.HIGHEST,) * 2, dot_precisions(jaxpr.jaxpr)
  assert {name for name, precision in found if precision == full} == {"float32"}
  assert dtype == "bfloat16" or len(found) == 1


class TestAttend:
  """The library's attention and ours, which serves dropout, unequal widths and float64, are one function."""

  def qkv(self, width=8, value=8, dtype=jnp.float32):
    rng = np.random.default_rng(1)
    shapes = ((2, 9, 6, width), (2, 9, 2, width), (2, 9, 2, value))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]

  @pytest.mark.parametrize("segmented", [False, True])
  def test_both_paths_agree(self, segmented):
    q, k, v = self.qkv()
    segments = jnp.cumsum(jnp.asarray(np.random.default_rng(2).integers(0, 2, (2, 9))), 1) if segmented else None
    library = attention_with_dropout(q, k, v, scale=0.3, segment_ids=segments)
    ours = attention_with_dropout(
      q,
      k,
      v,
      scale=0.3,
      segment_ids=segments,
      dropout_rate=0.0,
      dropout_keys=jax.random.split(jax.random.key(0), (2, 6)),
    )
    np.testing.assert_allclose(library, ours, rtol=2e-5, atol=2e-6)

  def test_value_width_may_differ(self):
    q, k, v = self.qkv(value=5)
    wide = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, 3)))
    np.testing.assert_allclose(
      attention_with_dropout(q, k, v, scale=0.3),
      attention_with_dropout(q, k, wide, scale=0.3)[..., :5],
      rtol=2e-5,
      atol=2e-6,
    )

  def test_dropout_drops_and_keeps_the_mean(self):
    q, k, v = self.qkv()
    ones = jnp.ones_like(v)
    y = jax.vmap(lambda key: attention_with_dropout(q, k, ones, scale=0.3, dropout_rate=0.25, dropout_keys=key))(
      jax.random.split(jax.random.key(0), (400, 2, 6))
    )
    assert float(y.std()) > 0.05
    np.testing.assert_allclose(y.mean(), 1, atol=0.01)


def test_dropout_needs_a_key_and_keeps_the_mean():
  config = dataclasses.replace(TINY, dropout=0.3)
  params, ids = random_params(config), tokens()
  plain = logits_of(TINY, params, ids)
  np.testing.assert_array_equal(logits_of(config, params, ids), plain)
  first, second = (logits_of(config, params, ids, dropout_key=jax.random.key(seed)) for seed in (0, 1))
  assert np.abs(first - plain).max() > 1e-2 and np.abs(first - second).max() > 1e-2
