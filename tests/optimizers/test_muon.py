"""Muon against NumPy, the parameters that it gets, and the same update on every mesh."""

import collections
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config_sections import MeshConfig, OptimizerConfig
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.transformer import init_params
from deepseek_jax.model_config import AttentionConfig
from deepseek_jax.optimizers import muon
from deepseek_jax.optimizers.optimizer import make_optimizer
from deepseek_jax.optimizers.trainable import split_trainable
from deepseek_jax.plan.count import count_operations
from deepseek_jax.plan.memory import estimate_memory
from deepseek_jax.sharding import with_concrete_shardings
from tests import meshes
from tests.configs import DENSE, MLA, V3, float64, make_config

CONFIG = OptimizerConfig(kind="muon", eps=1e-20)
MODELS = {
  "gqa": DENSE,
  "one_key_head": dataclasses.replace(DENSE, attention=AttentionConfig(heads=8, kv_heads=1, head_dim=8)),
  "tied": dataclasses.replace(DENSE, tied_embeddings=True),
  "mla_without_query_latent": dataclasses.replace(DENSE, attention=dataclasses.replace(MLA, q_lora_rank=0)),
  "moe_mla_mtp": V3,
}


def device_mesh(**sizes):
  mesh = MeshConfig(**{"data": 1, **sizes})
  return make_mesh(mesh, jax.devices()[: math.prod(dataclasses.astuple(mesh))])


def abstract_params(model):
  """Shapes and shardings of `model` on the mesh that is set."""
  return with_concrete_shardings(jax.eval_shape(lambda: init_params(model, None))[0], jax.sharding.get_mesh())


def noise(abstract, seed):
  """NumPy's noise in the shapes, dtypes and shardings of `abstract`, and so equal on every mesh."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda a: jax.device_put(rng.normal(size=a.shape).astype(a.dtype), a.sharding), abstract)


def flat(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)
  }


@functools.cache
def two_updates(name, mesh=()):
  """({path: parameter}, [gradients], [updates]) of two updates of a model in float64, on a mesh of (axis, size)s."""
  model = dataclasses.replace(MODELS[name], param_dtype="float64", compute_dtype="float64")
  with jax.enable_x64(True), jax.set_mesh(device_mesh(**dict(mesh))):
    abstract = abstract_params(model)
    tx = make_optimizer(dataclasses.replace(CONFIG, moments_dtype="float64"), model)
    params = noise(abstract, 0)
    state, update, grads, found = jax.jit(tx.init)(params), jax.jit(tx.update), [], []
    for step in (1, 2):
      grads.append(noise(abstract, step))
      updates, state = jax.block_until_ready(update(grads[-1], state, params))
      found.append(updates)
    return flat(jax.device_get(params)), *([flat(jax.device_get(x)) for x in trees] for trees in (grads, found))


@pytest.mark.parametrize("name", MODELS)
def test_every_hidden_matrix_and_nothing_else_has_momentum_alone(name):
  with jax.set_mesh(device_mesh()):
    params = abstract_params(MODELS[name])
    state = flat(jax.eval_shape(make_optimizer(CONFIG, MODELS[name]).init, params))
  sizes = {path: leaf.size for path, leaf in flat(params).items()}
  matrices = {path for path in sizes if path.endswith("/kernel") and not path.startswith("head/")}
  assert {path.split("muon/")[1].split("trace/")[1] for path in state if "/muon/" in path} == matrices
  for moment in ("mu/", "nu/"):
    assert {path.split(moment)[1] for path in state if "/adamw/" in path and moment in path} == set(sizes) - matrices
  elements = sum(leaf.size for leaf in state.values() if leaf.ndim)
  assert elements == sum(size * (1 if path in matrices else 2) for path, size in sizes.items())
  estimate = estimate_memory(dataclasses.replace(make_config(MODELS[name], 16, 4), optimizer=CONFIG))
  assert estimate.optimizer == 4 * elements


@pytest.mark.parametrize(("trainable", "labels"), [("final_norm/*", {"adamw"}), ("*/experts/*", {"muon"})])
def test_a_part_of_the_parameters(trainable, labels):
  with jax.set_mesh(device_mesh(fsdp=2)):
    params, _ = split_trainable(abstract_params(V3), (trainable,))
    tx = make_optimizer(dataclasses.replace(CONFIG, trainable=(trainable,)), V3)
    state = jax.eval_shape(tx.init, params)
    updates, _ = jax.eval_shape(tx.update, params, state, params)
  assert jax.tree.structure(updates) == jax.tree.structure(params)
  assert {path.split("inner_states/")[1].split("/")[0] for path, leaf in flat(state).items() if leaf.ndim} == labels


@pytest.mark.parametrize(
  ("axes", "is_matrix"),
  [
    (("embed", None), True),  # a router
    (("heads", "head_dim", "embed"), True),
    (("experts", "expert_embed", "mlp"), True),
    ((None,), False),  # the scale of a norm
    (("heads", "head_dim"), False),  # a bias of queries
    (("experts", "mlp"), False),  # biases of experts
    (("vocab", "embed"), False),
  ],
)
def test_biases_and_norms_are_vectors_also_where_they_have_two_dimensions(axes, is_matrix):
  assert muon.is_hidden_matrix(axes) == is_matrix


def test_what_is_neither_matrix_nor_vector_is_an_error():
  with pytest.raises(ValueError, match="neither matrix nor vector"):
    muon.is_hidden_matrix(("embed", None, "mlp"))


def numpy_muon(momentum, rows):
  """Algorithm 1 of the V4 report for one matrix of `rows` rows, by its formulas alone."""
  x = momentum.reshape(rows, -1)
  n, m = x.shape
  x = x / np.linalg.norm(x)
  for i in range(10):
    a, b, c = (3.4445, -4.7750, 2.0315) if i < 8 else (2, -1.5, 0.5)
    x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
  return (x * np.sqrt(max(n, m)) * 0.18).reshape(momentum.shape)


@pytest.mark.parametrize("name", ["gqa", "moe_mla_mtp"])
def test_two_updates_in_float64_equal_numpy(name):
  params, grads, found = two_updates(name)
  momentum = {path: 0.0 for path in params}
  moments = {path: [0.0, 0.0] for path in params}
  for step, ours in enumerate(found):
    norm = np.sqrt(sum((g**2).sum() for g in grads[step].values()))
    for path, w in params.items():
      g = grads[step][path] / max(norm, 1)
      decay = 0 if path.endswith("scale") else 0.1 * w
      if path.startswith(("embed", "head")) or path.endswith("scale"):
        m, v = moments[path]
        moments[path] = m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        expected = m / (1 - 0.9 ** (step + 1)) / (np.sqrt(v / (1 - 0.95 ** (step + 1))) + 1e-20)
      else:
        momentum[path] = 0.95 * momentum[path] + g
        looked_ahead = 0.95 * momentum[path] + g
        stack = w.shape[:2] if "/experts/" in path else w.shape[:1]
        # The output projection of attention has heads x head_dim rows, all others have their first dimension's.
        rows = math.prod(w.shape[len(stack) : -1]) if "/o/" in path else w.shape[len(stack)]
        expected = np.stack([numpy_muon(x, rows) for x in looked_ahead.reshape(-1, *w.shape[len(stack) :])])
        expected = expected.reshape(w.shape)
      np.testing.assert_allclose(ours[path], expected + decay, rtol=1e-9, atol=1e-10, err_msg=path)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 2e-2)])
def test_singular_values_are_near_one(dtype, tolerance, monkeypatch):
  stack = jnp.asarray(np.random.default_rng(0).normal(size=(5, 16, 24)), dtype)
  whole = np.asarray(muon.newton_schulz(stack).astype(jnp.float32))
  assert np.abs(np.linalg.svd(whole, compute_uv=False) - 1).max() < tolerance
  monkeypatch.setattr(muon, "MAX_BATCH_ELEMENTS", 2 * 16 * 24)  # the same in batches, of which the last is smaller
  np.testing.assert_allclose(np.asarray(muon.newton_schulz(stack).astype(jnp.float32)), whole, atol=tolerance / 10)


def test_zero_gradients_of_a_matrix_leave_it_in_place():
  assert not np.asarray(muon.newton_schulz(jnp.zeros((1, 4, 8)))).any()


MESHES = [
  ("moe_mla_mtp", dict(fsdp=2, expert=2)),
  ("gqa", dict(fsdp=2, tensor=2)),
  *(("moe_mla_mtp", {axis: 4}) for axis in ("data", "fsdp", "expert", "tensor", "context", "stage")),
  ("moe_mla_mtp", dict(context=2, stage=2)),
  ("one_key_head", dict(tensor=4)),
  ("mla_without_query_latent", dict(tensor=2, stage=2)),
]


@pytest.mark.parametrize(
  ("name", "mesh"),
  [
    pytest.param(*case, marks=() if case in MESHES[:2] else pytest.mark.meshes, id=meshes.name((*case, {})))
    for case in MESHES
  ],
)
def test_updates_in_float64_equal_one_device(name, mesh):
  for ours, expected in zip(two_updates(name, tuple(mesh.items()))[2], two_updates(name)[2], strict=True):
    for path, update in expected.items():
      assert np.abs(ours[path] - update).max() < 1e-10 * np.abs(update).max(), path


@pytest.mark.meshes
@pytest.mark.parametrize(
  ("name", "mesh", "parallel"),
  [
    ("dense", dict(data=2, fsdp=2), dict(zero=2)),
    ("dense", dict(stage=2, fsdp=2), {}),
    ("moe", dict(expert=2, tensor=2), {}),
    ("moe", dict(context=2, expert=2), dict(offload=True)),
  ],
)
def test_three_steps_in_float64_equal_one_device(name, mesh, parallel):
  config = dataclasses.replace(meshes.CONFIGS[name], optimizer=CONFIG)
  meshes.assert_equal(float64(config), mesh, parallel)


def dimensions(path, shape):
  """(matrices, rows, columns) of a stacked parameter, and the positions of the dimensions that may be sharded."""
  stack = 2 if "/experts/" in path else 1
  columns = len(shape) - 1 if path.endswith("/o/kernel") else stack + 1  # whose rows are heads x head_dim
  sizes = (math.prod(shape[i:j]) for i, j in ((0, stack), (stack, columns), (columns, None)))
  return tuple(sizes), (stack, columns)


@pytest.mark.parametrize(
  ("name", "mesh"),
  [
    ("gqa", dict(data=4)),
    ("gqa", dict(fsdp=2, tensor=2)),
    *(("moe_mla_mtp", {axis: 4}) for axis in ("tensor", "expert", "stage")),
  ],
  ids=str,
)
def test_an_update_sends_whole_matrices_and_shards_and_holds_what_the_plan_says(name, mesh):
  """All matrices of one shape, with the same dimensions sharded, share an all-to-all per such dimension, both ways."""
  with jax.set_mesh(device_mesh(**mesh)):
    params, tx = abstract_params(MODELS[name]), make_optimizer(CONFIG, MODELS[name])
    state = with_concrete_shardings(jax.eval_shape(tx.init, params), jax.sharding.get_mesh())
    compiled = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state, params).compile()
    memory = muon.update_bytes(MODELS[name], params)
  groups = collections.Counter()
  for path, leaf in flat(params).items():
    if path.endswith("/kernel") and not path.startswith("head/"):
      (matrices, *sizes), places = dimensions(path, leaf.shape)
      local = dimensions(path, leaf.sharding.shard_shape(leaf.shape))[0]
      both = [
        (size, leaf.sharding.spec[i], size // part) for size, i, part in zip(sizes, places, local[1:], strict=True)
      ]
      both.sort(key=lambda x: x[0])
      groups[tuple(both)] += local[0]
  expected = collections.Counter()
  for both, matrices in groups.items():
    devices = math.prod(shards for *_, shards in both)
    padded = -(-matrices // devices) * both[0][0] * both[1][0]
    for *_, shards in both:
      if shards > 1:
        expected.update({"all-to-all": 2, "elements": 2 * padded})
  found = collections.Counter()
  for shapes, kind in re.findall(
    r"= (\S.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(", compiled.as_text()
  ):
    if moved := re.findall(r"\[([\d,]+)\]", shapes):  # else it is the norm
      found.update({kind: 1, "elements": sum(math.prod(map(int, shape.split(","))) for shape in moved)})
  assert found == expected and bool(found) == (mesh != dict(data=4))
  assert 0.5 < memory / compiled.memory_analysis().temp_size_in_bytes < 1.5


def test_the_plan_counts_the_flops_of_newton_schulz():
  mesh = {"fsdp": 2, "expert": 2}
  with jax.set_mesh(device_mesh(**mesh)):
    params, tx = abstract_params(V3), make_optimizer(CONFIG, V3)
    state = jax.eval_shape(tx.init, params)
    operations = count_operations(jax.jit(tx.update).trace(params, state, params).jaxpr, {"data": 1, **mesh})
  flops = sum(o.count * o.flops for o in operations)
  expected = 0
  for path, leaf in flat(params).items():
    if path.endswith("/kernel") and not path.startswith("head/"):
      stack = 2 if "/experts/" in path else 1
      rows = math.prod(leaf.shape[stack:-1]) if "/o/" in path else leaf.shape[stack]
      n, m = sorted((rows, math.prod(leaf.shape[stack:]) // rows))
      expected += math.prod(leaf.shape[:stack]) * 10 * (4 * n * n * m + 2 * n**3) / 4
  assert expected <= flops < 1.5 * expected  # more where a stack is padded, or devices hold copies
