"""Variants that are added in a process: computed and trained by name, replaced, and refused where they must be."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import deepseek_jax
from deepseek_jax import variants
from deepseek_jax.config import Config
from deepseek_jax.config_sections import DataConfig, EvalConfig, MeshConfig, SampleConfig, TrainConfig
from deepseek_jax.console import SilentConsole
from deepseek_jax.errors import ConfigError
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.attention import Attention
from deepseek_jax.model.attention_kinds import ATTENTION
from deepseek_jax.model.router import SCORES
from deepseek_jax.model.transformer import graphdef, init_params
from deepseek_jax.model_config import ATTENTION_KINDS, MoEConfig
from deepseek_jax.plan.attention import ATTENTION_PLANS
from deepseek_jax.plan.flops import training_flops
from tests.configs import DENSE, V3, with_moe, write_texts

SMALL = dataclasses.replace(DENSE, layers=1)


@pytest.fixture(autouse=True)
def shipped_tables():
  """Takes variants out of the tables again, which other tests in this process read."""
  choices = MoEConfig.__dataclass_fields__["score"].metadata["choices"]
  tables = SCORES, ATTENTION, ATTENTION_KINDS, ATTENTION_PLANS
  before, choices_before = [dict(table) for table in tables], list(choices)
  yield
  for table, rows in zip(tables, before, strict=True):
    table.clear()
    table.update(rows)
  choices[:] = choices_before


def with_kind(model, kind):
  return dataclasses.replace(model, attention=dataclasses.replace(model.attention, kind=kind))


def hidden_states(model):
  """[1, 8, embed], with the same random parameters for each module of these shapes."""
  with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
    params, buffers = init_params(model, jax.random.key(0))
    return np.asarray(forward(graphdef(model), params, buffers, jnp.arange(8)[None]))


@functools.partial(jax.jit, static_argnums=0)  # one program for both modules of a name, were it not for clear_caches
def forward(graph, params, buffers, tokens):
  return nnx.merge(graph, params, buffers)(tokens)[0]


class Scaled(Attention):
  """Attention whose output is multiplied by `factor`."""

  factor = 1.0

  def __call__(self, *arguments, **options):
    y, output = super().__call__(*arguments, **options)
    return self.factor * y, output


class Absent(Scaled):
  factor = 0.0


def test_an_attention_is_computed_by_its_name_and_can_be_replaced():
  variants.add_attention("scaled", Scaled, like="gqa")
  scaled = with_kind(SMALL, "scaled")
  before = hidden_states(scaled)
  np.testing.assert_array_equal(before, hidden_states(SMALL))
  assert training_flops(scaled, 32) == training_flops(SMALL, 32)
  variants.add_attention("scaled", Absent, like="gqa")
  assert np.abs(hidden_states(scaled) - before).max() > 0.01


def test_variants_are_trained_and_sampled_by_name(tmp_path):
  variants.add_score("sqrt_softplus", lambda logits: jnp.sqrt(jax.nn.softplus(logits)))
  variants.add_attention("mine", type("Mine", (Scaled,), {}), like="gqa")
  write_texts(tmp_path / "texts", files=4, words=30)
  model = with_moe(
    dataclasses.replace(V3, vocab=264, layers=1, first_dense_layers=0, num_mtp_layers=0), score="sqrt_softplus"
  )
  model = dataclasses.replace(model, attention=dataclasses.replace(DENSE.attention, kind="mine"))
  config = Config(
    model=model,
    data=DataConfig(sources=(str(tmp_path / "texts"),), cache=str(tmp_path / "cache"), seq=32, heldout_fraction=0.3),
    train=TrainConfig(steps=2, global_batch=4),
    eval=EvalConfig(final_sequences=4),
    sample=SampleConfig(max_tokens=2),
  )  # fmt: skip
  run = deepseek_jax.run(config, tmp_path / "run", console=SilentConsole())
  assert (run.config.model.moe.score, run.config.model.attention.kind) == ("sqrt_softplus", "mine")
  assert np.isfinite(run.metrics["loss"]).all() and len(run.metrics["loss"])


def test_what_is_no_variant_is_refused():
  with pytest.raises(ConfigError, match="'mla' is a shipped attention: give yours another name"):
    variants.add_attention("mla", Scaled)
  with pytest.raises(ConfigError, match="'sigmoid' is a shipped score"):
    variants.add_score("sigmoid", jnp.exp)
  with pytest.raises(ConfigError, match="the score 'other' is of type int: expected a function"):
    variants.add_score("other", 3)
  with pytest.raises(
    ConfigError, match="is no attention: expected an nnx.Module with __call__, decode and token_shapes"
  ):
    variants.add_attention("other", object)
  with pytest.raises(ConfigError, match="like='mine' is not one of gqa, mla"):
    variants.add_attention("other", Scaled, like="mine")
  with pytest.raises(ConfigError, match="model.moe.score must be one of softmax, sigmoid"):
    with_moe(V3, score="other")
