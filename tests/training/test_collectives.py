"""What each layout sends, read from compiled programs: no less than it must, no more, and not once for each microbatch.

The CPU's compiler keeps reduce-scatters that are written as such; `make tpu` reads the same programs compiled for TPUs.
"""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.transformer import graphdef
from deepseek_jax.sharding import spec
from deepseek_jax.training.schedule import StepInputs
from deepseek_jax.training.state import abstract_state
from deepseek_jax.training.step import make_train_step
from deepseek_jax.training.step_config import StepConfig
from tests import meshes

SEQ, EMBED, LAYERS = meshes.SEQ, meshes.DENSE.model.embed, meshes.DENSE.model.layers
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


@functools.cache
def collectives(model, mesh, parallel=(), microbatches=4):
  """Every collective of a compiled step: (kind, [shapes that it moves], set of "loop", "layer", "backward")."""
  config = meshes.changed(meshes.CONFIGS[model], dict(mesh), **dict(parallel))
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))
  with jax.set_mesh(make_mesh(config.mesh)) as _:
    mesh = make_mesh(config.mesh)
    state = abstract_state(StepConfig.of(config, bos=0), mesh)
    rows = NamedSharding(mesh, spec(None, "batch", None))
    batch = jax.ShapeDtypeStruct((microbatches, 8, SEQ + 1), jnp.int32, sharding=rows)
    rates = StepInputs.abstract("float32")
    step = jax.jit(make_train_step(StepConfig.of(config, bos=0), graphdef(config.model)), static_argnums=2)
    text = step.lower(state, batch, microbatches, rates).compile().as_text()
  found = []
  for shapes, kind, name in re.findall(rf"= (\S.*?) ({KINDS})\(.*op_name=\"([^\"]*)\"", text):
    shapes = [tuple(map(int, s.split(","))) if s else () for s in re.findall(r"[a-z]\d+\[([\d,]*)\]", shapes)]
    # The loop over microbatches holds the loop over layers.
    where = {"loop"} if "while/body" in name else set()
    where |= {"layer"} if re.search(r"jvp\(\)+/while/body", name) else set()
    found.append((kind, shapes, frozenset(where | ({"backward"} if "transpose" in name else set()))))
  return found


def moved(found, minimum=EMBED * 4):
  """Collectives that move arrays of more than `minimum` elements: all but scalars, counts and the scales of norms."""
  size = lambda shape: functools.reduce(lambda a, b: a * b, shape, 1)
  return [(kind, big, where) for kind, shapes, where in found if (big := [s for s in shapes if size(s) > minimum])]


@pytest.mark.parametrize(
  ("layout", "zero"), [((("data", 4),), 3), ((("data", 2), ("fsdp", 2)), 1), ((("data", 2), ("fsdp", 2)), 3)]
)
def test_copies_of_parameters_have_their_gradients_reduced_once_a_step(layout, zero):
  found = moved(collectives("dense", layout, (("zero", zero),)))
  sharded = dict(layout).get("fsdp", 1) > 1
  outside = collections.Counter(kind for kind, shapes, where in found if "loop" not in where for _ in shapes)
  in_loop = {kind for kind, _, where in found if "loop" in where}
  matrices = 9  # of attention and SwiGLU, stacked; embedding and head
  expected = {"all-reduce": matrices}
  if sharded and zero == 1:
    expected |= {"all-gather": matrices, "reduce-scatter": matrices}
  assert outside == expected
  # ZeRO-3 gathers weights and scatters their gradients for each layer of each microbatch, and does no more than that.
  assert in_loop == ({"all-gather", "reduce-scatter"} if sharded and zero == 3 else set())


def test_zero_3_gathers_each_matrix_of_a_layer_once_and_scatters_its_gradient_once():
  found = moved(collectives("dense", (("fsdp", 4),)))
  in_layers = collections.Counter((kind, "backward" in where) for kind, _, where in found if "layer" in where)
  # remat=none: the backward pass of a layer uses what the forward pass gathered, or gathers it anew to save memory.
  assert in_layers["all-gather", False] == 7 and in_layers["reduce-scatter", True] == 7
  assert set(in_layers) <= {("all-gather", False), ("all-gather", True), ("reduce-scatter", True)}
  assert in_layers["all-gather", True] <= 7


def test_zero_2_scatters_gradients_for_each_microbatch_and_gathers_weights_once():
  found = moved(collectives("dense", (("fsdp", 4),), (("zero", 2),)))
  assert {kind for kind, _, where in found if "loop" in where} == {"reduce-scatter"}
  assert {kind for kind, _, where in found if "loop" not in where} == {"all-gather"}


def test_tensor_parallelism_gathers_and_scatters_twice_a_block_each_way():
  found = moved(collectives("dense", (("tensor", 4),)))
  blocks = collections.Counter(
    (kind, shapes[0], "backward" in where) for kind, shapes, where in found if "layer" in where and EMBED in shapes[0]
  )
  whole, part = (8, SEQ, EMBED), (8, SEQ // 4, EMBED)
  expected = {(kind, shape) for kind, shape in (("all-gather", whole), ("reduce-scatter", part))}
  assert blocks == {(*what, backward): 2 for what in expected for backward in (False, True)}


def test_experts_have_one_dispatch_and_one_combine_a_layer():
  found = collectives("moe", (("expert", 4),))
  travels = collections.Counter(
    "backward" in where
    for kind, shapes, where in found
    if kind == "all-to-all" and "layer" in where and shapes[0][-1] == EMBED
  )
  assert travels == {False: 2, True: 2}
  facts = [shapes for kind, shapes, where in found if kind == "all-to-all" and shapes[0][-1] != EMBED]
  # Weights and choices of what travels: of a token's three at most the two that one device has.
  assert all(shape[-1] == 2 * 2 for shapes in facts for shape in shapes)
  mlp = meshes.V3.model.moe.mlp
  kernels = {(EMBED, mlp), (mlp, EMBED)}
  assert not [
    s for _, shapes, _ in found for s in shapes if len(s) > 2 and s[-2:] in kernels
  ]  # experts stay where they are


@pytest.mark.parametrize("kind", ["gather", "ring"])
def test_context_sends_keys_and_latents_alone(kind):
  found = moved(collectives("moe", (("context", 4),), (("kind", kind), ("zero", 1))), minimum=8)
  in_layers = [(what, shape) for what, shapes, where in found if "layer" in where for shape in shapes]
  kinds = {"gather": {"all-gather", "reduce-scatter"}, "ring": {"collective-permute"}}[kind]
  attention = meshes.V3.model.attention
  widths = {attention.kv_lora_rank, attention.qk_rope_head_dim}
  assert {what for what, shape in in_layers if len(shape) > 2 and shape[-1] in widths} == kinds
  assert not [
    shape for _, shape in in_layers if len(shape) > 3 and shape[-2] == attention.heads
  ]  # keys, values of heads


def test_stages_pass_the_stream_alone_while_microbatches_run():
  found = moved(collectives("dense", (("stage", 4),), (("zero", 1),), microbatches=8))
  assert {kind for kind, _, where in found if "loop" in where} == {"collective-permute"}
  assert {shape[-2:] for kind, shapes, _ in found for shape in shapes if kind == "collective-permute"} == {(SEQ, EMBED)}
  # Before and after, layers go from shards to stages and their gradients back.
  assert {kind for kind, _, where in found if "loop" not in where} >= {"all-to-all", "reduce-scatter"}
