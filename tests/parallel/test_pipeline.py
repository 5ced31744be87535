"""The pipeline gives the gradients of the layers one after another, in memory independent of the microbatches."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from deepseek_jax.errors import ConfigError
from deepseek_jax.parallel.pipeline import interleaved_1f1b, layer_assignment, to_stage_params
from deepseek_jax.sharding import pvary

pytestmark = pytest.mark.jax_version

VOCAB, EMBED, ROWS, ROOM = 11, 8, 3, 9  # ROOM: microbatches that tokens are made for
UNEVEN = (2, 0, 1, 1, 1, 1, 2, 1)


def make_mesh(stages, experts=1):
  sizes = (stages, experts) if experts > 1 else (stages,)
  axes, devices = ("stage", "expert")[: len(sizes)], jax.devices()[: stages * experts]
  return jax.make_mesh(sizes, axes, axis_types=(AxisType.Explicit,) * len(sizes), devices=devices)


def problem(layers, experts):
  """Tokens [experts, ROOM, ROWS] and parameters: each expert multiplies its part of embed, as all_to_all brings it."""
  rng = np.random.default_rng(0)
  shapes = {"first": (VOCAB, EMBED), "last": (EMBED, VOCAB)}
  outer = {name: rng.normal(size=shape) for name, shape in shapes.items()}
  each = EMBED // experts
  layers = {"kernel": rng.normal(size=(layers, experts, each, each)), "bias": rng.normal(size=(layers, EMBED))}
  return rng.integers(VOCAB, size=(experts, ROOM, ROWS)), outer, layers


def layer(x, kernel, bias, to_experts, from_experts):
  """(y, u) of x [rows, embed], which must not be zeros: these give NaN."""
  u = from_experts(jnp.tanh(jnp.einsum("eni,eij->enj", to_experts(x), kernel)))
  return x / jnp.sqrt((x**2).sum(-1, keepdims=True)) + u + bias, u


def negative_log_likelihood(outer, x, tokens):
  return -jnp.take_along_axis(jax.nn.log_softmax(x @ outer["last"]), tokens[:, None], 1).sum()


def sequential(outer, layers, tokens):
  """(objective, (loss, positive elements of u of each layer)) of a microbatch [experts, ROWS], whole on one device."""
  experts, objective, positive = tokens.shape[0], 0.0, []

  def to_experts(x):  # [experts, rows, embed / experts]
    return x.reshape(len(x), experts, -1).swapaxes(0, 1)

  def from_experts(x):  # [rows, embed]
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)

  x = outer["first"][tokens.reshape(-1)]
  objective += 0.1 * (x**2).sum()
  for kernel, bias in zip(layers["kernel"], layers["bias"], strict=True):
    x, u = layer(x, kernel, bias, to_experts, from_experts)
    objective += 0.1 * (u**2).sum()
    positive.append((u > 0).sum())
  loss = negative_log_likelihood(outer, x, tokens.reshape(-1))
  return objective + loss, (loss, jnp.stack(positive))


def functions(tokens, mask, calls, experts):
  """first, chunk and last of a device; `calls` gets the name of each that is traced. tokens: [ROOM, ROWS]."""

  def first(outer, microbatch):
    calls.append("first")
    x = outer["first"][tokens[microbatch]]
    return x, 0.1 * (x**2).sum(), {"rows": jnp.int32(ROWS)}

  def to_experts(x):
    return (jax.lax.all_to_all(x, "expert", 1, 0, tiled=True) if experts > 1 else x)[None]

  def from_experts(x):
    return jax.lax.all_to_all(x[0], "expert", 0, 1, tiled=True) if experts > 1 else x[0]

  def one(x, slot):
    params, full = slot
    y, u = layer(x, params["kernel"], params["bias"], to_experts, from_experts)
    return jnp.where(full, y, x), (jnp.where(full, 0.1 * (u**2).sum(), 0), jnp.where(full, (u > 0).sum(), 0))

  def chunk(layers, virtual_stage, microbatch, x):
    calls.append("chunk")
    x, (objective, positive) = jax.lax.scan(
      jax.checkpoint(one), x, (layers, mask[jax.lax.axis_index("stage"), virtual_stage])
    )
    objective = objective.sum()
    # Summed, it is the same on all experts: counted once.
    return x, jax.lax.psum(objective, "expert") if experts > 1 else objective, {"positive": positive}

  def last(outer, microbatch, y):
    calls.append("last")
    loss = negative_log_likelihood(outer, y, tokens[microbatch])
    return loss, {"loss": loss}

  return first, chunk, last


def pipelined(mesh, table, mask, virtual_stages, calls):
  """(function of (outer, layers, tokens, microbatches), layouts of layers and tokens).

  It returns what `interleaved_1f1b` does, summed over the mesh: (gradients of outer and of layers, rows, positive
  elements [stages, virtual_stages, slots], loss).
  """
  experts = "expert" if "expert" in mesh.axis_names else None
  in_layers = {"kernel": jax.P(None, experts, None, "stage"), "bias": jax.P()}
  divided = {"kernel": 3, "bias": None}

  def device(outer, layers, tokens, microbatches):
    def mine(layers):
      return {name: to_stage_params(leaf, table, "stage", divided[name]) for name, leaf in layers.items()}

    three = functions(tokens[0], jnp.asarray(mask), calls, mesh.shape.get(experts, 1))
    layers, pull = jax.vjp(mine, pvary(layers))
    outer, layers, (of_first, of_chunk, of_last) = interleaved_1f1b(
      *three, pvary(outer), layers, microbatches, axis="stage", virtual_stages=virtual_stages
    )
    (layers,) = pull(layers)
    summed = jax.lax.psum((outer, layers["bias"], of_first["rows"], of_last["loss"]), mesh.axis_names)
    positive = jax.lax.psum(of_chunk["positive"], experts) if experts else of_chunk["positive"]
    return summed[0], layers | {"bias": summed[1]}, summed[2], positive[None], summed[3]

  in_specs = (jax.P(), in_layers, jax.P(experts), jax.P())
  out_specs = (jax.P(), in_layers, jax.P(), jax.P("stage"), jax.P())
  return jax.jit(jax.shard_map(device, mesh=mesh, in_specs=in_specs, out_specs=out_specs)), in_specs[1:3]


@pytest.mark.parametrize(
  "stages, virtual_stages, experts, layers, assignment",
  [(4, 1, 1, 6, ()), (2, 2, 1, 4, ()), (4, 2, 1, 9, UNEVEN), (2, 2, 2, 5, ()), (2, 1, 2, 3, (1, 2)), (4, 3, 1, 12, ())],
)
def test_gradients_are_those_of_the_layers_one_after_another(stages, virtual_stages, experts, layers, assignment):
  mesh, (table, mask), calls = (
    make_mesh(stages, experts),
    layer_assignment(layers, stages, virtual_stages, assignment),
    [],
  )
  with jax.enable_x64(True):
    tokens, outer, params = problem(layers, experts)
    each = jax.vmap(jax.grad(sequential, argnums=(0, 1), has_aux=True), (None, None, 1))
    wanted = jax.tree.map(np.asarray, jax.jit(each)(outer, params, tokens))  # [ROOM, ...]
    with jax.set_mesh(mesh):
      function, specs = pipelined(mesh, table, mask, virtual_stages, calls)
      shards = jax.device_put((params, tokens), jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs))
      for microbatches in (1, stages, 2 * stages + 1):
        ours = jax.tree.map(np.asarray, function(outer, *shards, jnp.int32(microbatches)))
        gradients, (losses, positive) = jax.tree.map(lambda leaf, m=microbatches: leaf[:m].sum(0), wanted)
        of_outer, of_layers, rows, counted, loss = ours
        close((of_outer, of_layers, loss), (*gradients, losses))
        assert rows == tokens[:, :microbatches].size
        np.testing.assert_array_equal(counted[mask], positive[table[mask]])
        assert not counted[~mask].any()
  assert sorted(calls) == ["chunk", "first", "last"]  # traced once each, whatever the number of microbatches


def close(ours, wanted):
  def compare(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * np.abs(b).max())

  jax.tree.map(compare, ours, wanted)


def test_nothing_leaks_from_where_there_is_no_item():
  """A chunk that gives NaN for any x but that of its turn: x is (value, chunks passed)."""
  stages, virtual_stages, microbatches = 4, 2, 5
  mesh, (table, _) = make_mesh(stages), layer_assignment(stages * virtual_stages, stages, virtual_stages)

  def chunk(layers, virtual_stage, microbatch, x):
    turn = x[1] == virtual_stage * stages + jax.lax.axis_index("stage")
    right = jnp.where(turn, 1.0, jnp.nan)
    return jnp.stack([x[0] * layers[0], x[1] + 1]) * right, right * layers[0], right

  def device(outer, layers):
    return jax.tree.map(
      lambda leaf: leaf[None],
      interleaved_1f1b(
        lambda outer, microbatch: (jnp.stack([outer * (microbatch + 1), 0 * outer]), 0 * outer, ()),
        chunk,
        lambda outer, microbatch, y: (y[0], y[1]),
        pvary(outer),
        to_stage_params(pvary(layers), table, "stage", None),
        microbatches,
        axis="stage",
        virtual_stages=virtual_stages,
      ),
    )

  layers = np.linspace(0.5, 1.5, stages * virtual_stages)
  with jax.enable_x64(True), jax.set_mesh(mesh):
    function = jax.jit(jax.shard_map(device, in_specs=jax.P(), out_specs=jax.P("stage")))
    of_outer, of_layers, (_, right, passed) = jax.tree.map(np.asarray, function(2.0, layers))
  total = layers.prod() * 15  # 1 + 2 + ... + 5
  np.testing.assert_allclose(of_outer.sum(), total, rtol=1e-12)
  np.testing.assert_allclose(of_layers, (microbatches + 2 * total / layers)[table], rtol=1e-12)
  assert (right == microbatches).all() and passed.sum() == microbatches * stages * virtual_stages


STAGES, CIRCUITS, WIDE = 4, 2, 4096


def wide(microbatches):
  """A traced pipeline of [ROWS, WIDE] activations, small parameters and nothing else on the devices."""
  mesh, (table, _) = make_mesh(STAGES), layer_assignment(8, STAGES, CIRCUITS)

  def first(outer, microbatch):
    return jnp.sin(outer + microbatch * jnp.ones((ROWS, WIDE))), 0 * outer, {}

  def chunk(layers, virtual_stage, microbatch, x):
    return jax.lax.scan(lambda x, scale: (jnp.tanh(x * scale), None), x, layers)[0], 0.0, {}

  def last(outer, microbatch, y):
    return (outer * y).sum(), {}

  def device(outer, layers):
    layers = to_stage_params(pvary(layers), table, "stage", None)
    of_outer, of_layers, _ = interleaved_1f1b(
      first, chunk, last, pvary(outer), layers, microbatches, axis="stage", virtual_stages=CIRCUITS
    )
    return of_outer[None], of_layers[None]

  with jax.set_mesh(mesh):
    shapes = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.float32)
    return jax.jit(jax.shard_map(device, in_specs=jax.P(), out_specs=jax.P("stage"))).trace(*shapes)


def test_memory_does_not_grow_with_the_microbatches():
  few, many = (wide(m).lower().compile().memory_analysis().temp_size_in_bytes for m in (2 * STAGES, 8 * STAGES))
  assert many < 1.1 * few
  kept, boxes, working = (CIRCUITS + 2) * STAGES - 2, 5, 5
  assert many < (kept + boxes + working) * ROWS * WIDE * 4


def test_stages_talk_to_their_neighbors_alone():
  hlo = wide(3).lower().compile().as_text()
  collectives = r" (all-\w+|collective-\w+|reduce-scatter|ragged-\w+)\("
  assert re.findall(collectives, hlo) == ["collective-permute"] * 5
  forth, back = "{{0,1},{1,2},{2,3},{3,0}}", "{{0,3},{1,0},{2,1},{3,2}}"
  assert sorted(re.findall(r"source_target_pairs=({{.*?}})", hlo)) == [forth] + [back] * 4


def test_all_devices_take_the_same_branches():
  def predicates(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name == "cond":
        yield equation.invars[0].aval
      inner = [p for value in equation.params.values() for p in (value if isinstance(value, tuple) else (value,))]
      for part in inner:
        part = getattr(part, "jaxpr", part)
        yield from predicates(part) if hasattr(part, "eqns") else ()

  found = list(predicates(wide(3).jaxpr.jaxpr))
  assert len(found) == 5 and not any(aval.manual_axis_type.varying for aval in found)


@pytest.mark.parametrize("divided", [None, 2])
def test_to_stages_moves_rows_and_its_transpose_moves_gradients_back(divided):
  mesh, (table, mask) = make_mesh(4), layer_assignment(9, 4, 2, UNEVEN)
  leaf = np.arange(9.0 * 3 * 8).reshape(9, 3, 8)
  weights = np.random.default_rng(0).normal(size=(4, 2, 2, 3, 8))
  spec = jax.P() if divided is None else jax.P(None, None, "stage")

  def device(leaf, weights):
    moved, pull = jax.vjp(lambda leaf: to_stage_params(leaf, table, "stage", divided), pvary(leaf))
    back = pull(weights[0])[0]
    return moved[None], back if divided else jax.lax.psum(back, "stage")

  with jax.enable_x64(True), jax.set_mesh(mesh):
    shards = (jax.device_put(a, jax.NamedSharding(mesh, s)) for a, s in ((leaf, spec), (weights, jax.P("stage"))))
    function = jax.jit(jax.shard_map(device, in_specs=(spec, jax.P("stage")), out_specs=(jax.P("stage"), spec)))
    moved, back = jax.tree.map(np.asarray, function(*shards))
  np.testing.assert_array_equal(moved[mask], leaf[table[mask]])
  assert not moved[~mask].any()
  wanted = np.zeros_like(leaf)
  wanted[table[mask]] = weights[mask]
  np.testing.assert_array_equal(back, wanted)


@pytest.mark.parametrize("layers, stages, virtual_stages", [(61, 16, 1), (95, 8, 3), (4, 4, 1), (27, 4, 2), (5, 1, 2)])
def test_layers_are_shared_evenly_in_their_order(layers, stages, virtual_stages):
  table, mask = layer_assignment(layers, stages, virtual_stages)
  counts = mask.sum(-1).T.reshape(-1)  # of chunks in the order in which they run
  assert table.dtype == np.int32 and table.shape == mask.shape == (
    stages,
    virtual_stages,
    -(-layers // (stages * virtual_stages)),
  )
  np.testing.assert_array_equal(table.swapaxes(0, 1)[mask.swapaxes(0, 1)], np.arange(layers))
  assert counts.max() - counts.min() <= 1 and (np.diff(counts) <= 0).all()
  assert (table[~mask] == layers).all()


def test_layers_are_shared_as_assigned():
  table, mask = layer_assignment(9, 4, 2, UNEVEN)
  np.testing.assert_array_equal(mask.sum(-1).T.reshape(-1), UNEVEN)
  np.testing.assert_array_equal(table[:, 0], [[0, 1], [9, 9], [2, 9], [3, 9]])


@pytest.mark.parametrize("assignment", [(3, 3), (2, 2, 2), (2, 2, 2, 1), (3, 3, 3, -2)])
def test_assignments_that_do_not_fit_are_errors(assignment):
  with pytest.raises(ConfigError, match=r"stage_layers must have 4 .*2 stages x 2 virtual stages.* sum to 6, got"):
    layer_assignment(6, 2, 2, assignment)
