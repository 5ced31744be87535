"""Each attention kind has a row in every table, and one that no published format knows saves and starts runs."""

import dataclasses

import jax
import numpy as np
import pytest

from deepseek_jax.checkpoint.compatibility import check_weights_fit
from deepseek_jax.checkpoint.convert import convert
from deepseek_jax.checkpoint.manager import FORMAT_VERSION, Checkpointer
from deepseek_jax.checkpoint.weights import open_weights
from deepseek_jax.config_sections import CheckpointConfig, MeshConfig
from deepseek_jax.errors import CheckpointError
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.attention import Attention
from deepseek_jax.model.attention_kinds import ATTENTION
from deepseek_jax.model.linear import Linear
from deepseek_jax.model_config import ATTENTION_KINDS
from deepseek_jax.plan.attention import ATTENTION_PLANS
from deepseek_jax.plan.flops import count_parameters, training_flops
from deepseek_jax.training.state import abstract_state
from deepseek_jax.training.step_config import StepConfig
from tests import configs
from tests.steps import make_state

# checkpoint/hf_attention.py has a row only for kinds that a published format has.
TABLES = {
  "ATTENTION in model/attention_kinds.py": ATTENTION,
  "ATTENTION_KINDS in model_config.py": ATTENTION_KINDS,
  "ATTENTION_PLANS in plan/attention.py": ATTENTION_PLANS,
}


def check_rows(name):
  kinds = {kind for table in TABLES.values() for kind in table}
  missing = kinds - set(TABLES[name])
  assert not missing, f"{name} has no row for {', '.join(missing)}"


@pytest.mark.parametrize("name", TABLES)
def test_every_kind_has_a_row_in(name):
  check_rows(name)


@pytest.mark.parametrize("name", TABLES)
def test_the_table_that_lacks_a_row_is_named(name, monkeypatch):
  for other in TABLES:
    if other != name:
      monkeypatch.setitem(TABLES[other], "sparse", None)
  with pytest.raises(AssertionError, match=f"{name} has no row for sparse"):
    check_rows(name)


class Gated(Attention):
  """GQA with one more parameter."""

  def __init__(self, config, rngs):
    super().__init__(config, rngs)
    a = config.attention
    self.gate = Linear((config.embed, a.heads, a.head_dim), ("embed", "heads", "head_dim"), config, rngs)


@pytest.fixture
def gated(monkeypatch):
  """A config of a kind that no published format has."""
  monkeypatch.setitem(ATTENTION, "gated", Gated)
  monkeypatch.setitem(ATTENTION_KINDS, "gated", ATTENTION_KINDS["gqa"])
  monkeypatch.setitem(ATTENTION_PLANS, "gated", ATTENTION_PLANS["gqa"])
  model = dataclasses.replace(configs.DENSE, attention=dataclasses.replace(configs.GQA, kind="gated"))
  return configs.make_config(model, seq=8, global_batch=4)


def test_a_kind_without_a_published_format_saves_and_starts_runs(gated, tmp_path):
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  with jax.set_mesh(mesh):
    state, abstract = make_state(gated, mesh), abstract_state(StepConfig.of(gated, bos=0), mesh)
    meta = {
      "format_version": FORMAT_VERSION,
      "config": dataclasses.asdict(gated),
      "samples": 0,
      "data_fingerprint": "f",
    }
    with Checkpointer(tmp_path / "run", CheckpointConfig()) as checkpointer:
      checkpointer.save(1, state, meta)
      checkpointer.wait()
      resumed = checkpointer.restore(1, abstract)
    weights = open_weights(tmp_path / "run")
    loaded = weights.load({"params": abstract.params, "buffers": abstract.buffers})
  jax.tree.map(np.testing.assert_array_equal, resumed, state)
  jax.tree.map(np.testing.assert_array_equal, loaded["params"], state.params)
  assert "gate" in loaded["params"]["dense_layers"]["attn"]
  assert check_weights_fit("run", weights.model, gated) == []
  for other in (configs.with_model(gated, attention=configs.GQA), configs.with_model(gated, embed=16)):
    with pytest.raises(CheckpointError, match="model.attention.kind: checkpoint gated|model.embed: checkpoint 32"):
      check_weights_fit("run", weights.model, other)
  with pytest.raises(
    CheckpointError, match="model.attention.kind=gated has no Hugging Face format, only gqa, mla have"
  ):
    convert(tmp_path / "run", tmp_path / "hf")


def test_a_plan_counts_a_kinds_own_parameters(gated):
  gqa = dataclasses.replace(gated.model, attention=configs.GQA)
  gate = gated.model.layers * gated.model.embed * configs.GQA.heads * configs.GQA.head_dim
  assert count_parameters(gated.model).total == count_parameters(gqa).total + gate
  assert training_flops(gated.model, 8).matmul == training_flops(gqa, 8).matmul + 6 * gate
