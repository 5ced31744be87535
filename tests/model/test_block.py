"""What docs/explanation/expert_parallelism.md says of a block's collectives is what a block issues."""

import collections
import pathlib
import re

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding

from deepseek_jax.config_sections import MeshConfig
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model import expert_parallel
from deepseek_jax.model.batch_context import BatchContext
from deepseek_jax.model.block import Block
from deepseek_jax.model_config import ModelConfig, MoEConfig
from deepseek_jax.sharding import reduce_scatter_sequence, spec, spmd

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "explanation" / "expert_parallelism.md"
PRIMITIVES = {
  "all_gather": "all-gather",
  "reduce_scatter": "reduce-scatter",
  "ragged_all_to_all": "ragged all-to-all",
  "psum": "all-reduce",
  "all_to_all": "all-to-all",
}


def collectives(jaxpr):
  """(name, mesh axes) of each collective of `jaxpr` and of what it calls."""
  for equation in jaxpr.eqns:
    if name := PRIMITIVES.get(equation.primitive.name):
      axes = equation.params.get("axis_name", equation.params.get("axes"))
      yield name, "x".join(axes) if isinstance(axes, tuple) else axes
    for inner in jaxprs_in_params(equation.params):
      yield from collectives(inner)


def test_an_moe_layer_issues_the_collectives_of_the_docs(monkeypatch):
  """With 2 devices on `expert` where the docs have 8, which changes shapes only."""
  monkeypatch.setattr(expert_parallel, "has_ragged_all_to_all", lambda device_kind: True)  # traced only: CPUs have none
  moe = MoEConfig(num_routed_experts=4, num_shared_experts=1, num_experts_per_token=2, mlp=16)
  config = ModelConfig(embed=32, mlp=32, compute_dtype="float32", moe=moe)
  mesh = make_mesh(MeshConfig(data=1, expert=2, tensor=2))
  with jax.set_mesh(mesh):
    abstract = jax.eval_shape(lambda: Block(config, nnx.Rngs(0), is_moe=True))
    graphdef, state = nnx.graphdef(abstract), nnx.to_pure_dict(nnx.state(abstract))
    stream = spec("batch", "stream", None)
    x = jax.ShapeDtypeStruct((4, 8, 32), jnp.float32, sharding=NamedSharding(mesh, stream))

    def feed_forward(params, x):
      block = nnx.merge(graphdef, params)
      context = BatchContext(*[None] * 7)  # all tokens are routed
      return x + reduce_scatter_sequence(block.feed_forward(block.mlp_norm(x), context)[0])

    layout = jax.tree.map(lambda a: a.sharding.spec, state), stream
    jaxpr = jax.make_jaxpr(spmd(feed_forward, layout, stream))(state, x)
  rows = re.findall(r"^\| \d \| (?:(\d) x )?([a-z- ]+) \| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.M)
  stated = collections.Counter()
  for count, name, axis in rows:
    stated[name, axis] += int(count or 1)
  assert stated and collections.Counter(collectives(jaxpr.jaxpr)) == stated
