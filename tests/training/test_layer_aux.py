"""A layer with an observation and a loss of its own: declared once, seen alike on one device and in a pipeline."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from deepseek_jax.config_sections import MeshConfig
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model import attention
from deepseek_jax.model.layer_output import LayerOutput
from deepseek_jax.sharding import all_gather_sequence, psum, spec
from deepseek_jax.training import layer_aux
from deepseek_jax.training.layer_aux import LayerAux, Observation, add_metrics, logged_metrics, make_aux_fn
from deepseek_jax.training.schedule import StepInputs
from deepseek_jax.training.step_config import StepConfig
from tests.configs import DENSE, GQA, MOE, float64, make_config
from tests.steps import make_state, make_step_with_grads

SEQ, BATCH = 8, 4
MODEL = dataclasses.replace(
  DENSE, embed=16, mlp=16, layers=3, first_dense_layers=1,
  attention=dataclasses.replace(GQA, heads=2, kv_heads=2), moe=dataclasses.replace(MOE, mlp=8),
)  # fmt: skip


def observe(norms, config):
  """Of [batch, seq]: a loss, a count, a mean, and an array by layer."""
  return {
    "norm_loss": 0.1 * psum(norms.sum(1), "seq") / SEQ, "large_norms": (norms > 0.1).sum(dtype=jnp.int32),
    "norm_mean": norms.sum(), "norm_of_layers": norms.sum()[None],
  }  # fmt: skip


ROW = LayerAux(
  observe,
  {
    "norm_loss": Observation(is_loss=True), "large_norms": Observation(partial_over=("seq",)),
    "norm_mean": Observation(is_mean=True, partial_over=("seq",)),
    "norm_of_layers": Observation(
      by_layer=True, partial_over=("seq",), log=lambda model, norms: ({f"norm/{stack}": float(x.sum()) for stack, x in norms.items()}, {})
    ),
  },
)  # fmt: skip


@pytest.fixture
def observed_attention(monkeypatch):
  """Attention of every layer, dense ones as well, that observes the norms of its keys."""
  call = attention.Attention.__call__

  def observing(self, x, batch_context, dropout_key=None):
    y, output = call(self, x, batch_context, dropout_key)
    _, keys, _ = self.project_qkv(all_gather_sequence(x), batch_context.rotation)  # [batch, seq, heads, width]
    return y, LayerOutput({"norms": jnp.square(keys).mean((2, 3))})

  monkeypatch.setattr(attention.Attention, "__call__", observing)
  monkeypatch.setitem(layer_aux.LAYER_AUX, "norms", ROW)


def step(**axes):
  """(metrics, gradients) of a step in float64 on a mesh of `axes`."""
  config = dataclasses.replace(float64(make_config(MODEL, SEQ, BATCH, 1)), mesh=MeshConfig(**{"data": 1, **axes}))
  mesh = make_mesh(config.mesh, jax.devices()[: int(np.prod(list(axes.values())))])
  with jax.enable_x64(True), jax.set_mesh(mesh):
    state = make_state(config, mesh)
    tokens = np.random.default_rng(0).integers(0, 64, (BATCH, 1, SEQ + 1)).astype(np.int32)
    batch = jax.device_put(tokens, NamedSharding(mesh, spec(None, "batch", None)))
    inputs = StepInputs(1e-2, 0.3, 1e-2).as_arrays("float64")
    _, metrics, grads = jax.block_until_ready(
      jax.jit(make_step_with_grads(config), static_argnums=2)(state, batch, BATCH, inputs)
    )
    return jax.device_get(metrics), jax.device_get(grads)


def test_it_is_the_same_in_a_pipeline_with_dense_layers_before_it(observed_attention):
  (metrics, grads), (in_pipeline, pipeline_grads) = step(), step(stage=2, context=2)
  layers = metrics["norm_of_layers"]
  assert {stack: x.shape for stack, x in layers.items()} == {
    "dense_layers": (1, 1),
    "moe_layers": (2, 1),
  }
  tokens = BATCH * SEQ
  assert metrics["norm_mean"] == pytest.approx(sum(x.sum() for x in layers.values()) / tokens)
  assert metrics["norm_loss"] == pytest.approx(0.1 * metrics["norm_mean"]) and metrics["large_norms"] > 0
  terms = metrics["loss"] + metrics["balance_loss"] + metrics["norm_loss"]
  assert metrics["total_loss"] == pytest.approx(terms)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), in_pipeline, metrics)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12), pipeline_grads, grads)


def test_logged_are_scalars_and_what_a_row_makes_of_layers(observed_attention):
  layers = {"moe_layers": np.array([[1.0], [2.0]])}
  metrics = {"loss": np.float32(3), "mtp_loss": np.array([1.0, 2.0]), "skipped": {"total": 4, "in_a_row": 1}}
  scalars, histograms = logged_metrics(MODEL, metrics | {"norm_of_layers": layers})
  assert scalars == {"loss": 3, "mtp_loss_1": 1, "mtp_loss_2": 2, "skipped": 4, "norm/moe_layers": 3}
  assert histograms == {}


@pytest.mark.parametrize(
  "wrong",
  [dict(is_loss=True), dict(skip_cause=lambda config, value: ("", "")), dict()],
  ids=["loss", "skip_cause", "without log"],
)
def test_what_cannot_be_by_layer_is_an_error(wrong):
  with pytest.raises(ValueError, match="by layer"):
    Observation(by_layer=True, **wrong)


@pytest.mark.parametrize("name", ["load", "grad_norm"])
def test_a_name_that_is_taken_is_an_error(monkeypatch, name):
  monkeypatch.setitem(layer_aux.LAYER_AUX, "other", LayerAux(observe, {name: Observation()}))
  with pytest.raises(ValueError, match=f"declares {name}, which is a metric already"):
    layer_aux.observations()


def test_an_aux_without_a_row_is_an_error_that_names_the_table():
  with pytest.raises(KeyError, match="'indexer'.*LAYER_AUX"):
    make_aux_fn(StepConfig(MODEL))(LayerOutput({"indexer": jnp.zeros(())}))


def test_metrics_are_added_where_both_have_them():
  assert add_metrics({"a": 1, "load": {"x": 2}}, {"load": {"x": 3, "y": 4}, "b": 5}) == {
    "a": 1,
    "load": {"x": 5, "y": 4},
    "b": 5,
  }
