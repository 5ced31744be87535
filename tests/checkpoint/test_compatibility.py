"""Which config changes a checkpoint survives, and what the refusal says."""

import dataclasses
import json

import pytest

from deepseek_jax.checkpoint.compatibility import check_compatible, saved_value
from deepseek_jax.config import Config
from deepseek_jax.errors import CheckpointError
from deepseek_jax.schema import from_dict


def saved(**sections):
  """A config as a checkpoint's JSON gives it back."""
  return json.loads(json.dumps(dataclasses.asdict(make(**sections))))


def make(**sections):
  return from_dict(Config, {"name": "run", **sections})


def test_same_config_has_no_differences():
  assert check_compatible(saved(), make(), "f", "f") == []


def test_model_change_is_refused_with_every_field():
  now = make(model={"embed": 256, "attention": {"heads": 8}})
  with pytest.raises(CheckpointError) as error:
    check_compatible(saved(model={"embed": 128}), now, "f", "f")
  assert "model.embed: checkpoint 128, config 256; model.attention.heads: checkpoint 4, config 8" in str(error.value)
  assert "--workdir" in str(error.value)


@pytest.mark.parametrize(
  ("field", "value", "difference"),
  [
    ("moments_dtype", "bfloat16", "checkpoint float32, config bfloat16"),
    ("kind", "muon", "checkpoint adamw, config muon"),
  ],
)
def test_another_optimizer_state_is_refused(field, value, difference):
  with pytest.raises(CheckpointError, match=f"optimizer.{field}: {difference}"):
    check_compatible(saved(), make(optimizer={field: value}), "f", "f")


def test_the_order_of_trainable_patterns_does_not_matter_nor_do_duplicates():
  old = saved(optimizer={"trainable": ["*/attn/*", "head/*"]})
  assert check_compatible(old, make(optimizer={"trainable": ["head/*", "*/attn/*", "head/*"]}), "f", "f") == []


def test_other_patterns_that_select_the_same_parameters_are_returned():
  patterns = ["dense_layers/*", "*norm/scale", "embed", "head/*"]
  assert check_compatible(saved(), make(optimizer={"trainable": patterns}), "f", "f") == [
    ("optimizer.trainable", [], patterns)
  ]


def test_other_trained_parameters_are_refused_by_name():
  old = saved(optimizer={"trainable": ["*/attn/o/*", "head/*"]})
  with pytest.raises(CheckpointError) as error:
    check_compatible(old, make(optimizer={"trainable": ["head/*", "final_norm/*"]}), "f", "f")
  assert str(error.value) == (
    "the checkpoint's optimizer state does not fit: optimizer.trainable: checkpoint ['*/attn/o/*', 'head/*'], config "
    "['head/*', 'final_norm/*'] (frozen so far, to be trained: final_norm/scale. trained so far, to be frozen: "
    "dense_layers/attn/o/kernel); put the patterns back, or start from these weights with init_from and another --workdir"
  )


def test_other_changes_are_returned():
  now = make(
    model={"remat": "none", "dropout": 0.1, "attention": {"dropout": 0.2}},
    train={"steps": 5},
    data={"sources": ["a", "b"]},
  )
  differences = check_compatible(saved(), now, "f", "f")
  assert sorted(differences) == sorted([
    ("model.remat", "full", "none"),
    ("model.dropout", 0.0, 0.1),
    ("model.attention.dropout", 0.0, 0.2),
    ("train.steps", 1000, 5),
    ("data.sources", ["python-stdlib"], ["a", "b"]),
  ])  # fmt: skip


def test_changed_data_is_refused_unless_accepted():
  with pytest.raises(CheckpointError) as error:
    check_compatible(saved(), make(data={"text_field": "body"}), "old", "new")
  message = str(error.value)
  assert "old" in message and "new" in message and "data.text_field: checkpoint text, config body" in message
  assert "pass --accept_data_change" in message
  assert check_compatible(saved(), make(data={"text_field": "body"}), "old", "new", accept_data_change=True) == [
    ("data.text_field", "text", "body")
  ]


def test_another_length_of_sequences_is_no_other_data():
  assert check_compatible(saved(), make(data={"seq": 64}), "f", "f") == [("data.seq", 256, 64)]
  with pytest.raises(CheckpointError, match="the files or the tokenizer changed"):
    check_compatible(saved(), make(data={"seq": 64}), "old", "new")


def test_a_saved_value_is_the_default_where_the_checkpoint_lacks_it():
  assert saved_value(saved(data={"seq": 64}), "data.seq") == 64
  assert saved_value({"name": "run"}, "data.seq") == 256


def test_a_changed_seed_is_named_as_the_reason_for_other_data():
  with pytest.raises(CheckpointError) as error:
    check_compatible(saved(), make(seed=3), "old", "new")
  assert "(seed: checkpoint 0, config 3)" in str(error.value) and "changed" not in str(error.value)
  assert check_compatible(saved(), make(seed=3), "f", "f") == [("seed", 0, 3)]


def test_changed_files_under_the_same_config_are_named_as_such():
  elsewhere = {"cache": "/elsewhere", "verify": False, "mask_documents": True}
  for now in (make(), make(data=elsewhere), make(train={"steps": 5})):
    with pytest.raises(CheckpointError, match="the files or the tokenizer changed"):
      check_compatible(saved(), now, "old", "new")


def test_field_that_the_checkpoint_lacks_counts_as_its_default():
  old = saved()
  del old["model"]["norm_eps"], old["eval"]
  assert check_compatible(old, make(), "f", "f") == []
  with pytest.raises(CheckpointError, match="model.norm_eps: checkpoint 1e-06, config 0.001"):
    check_compatible(old, make(model={"norm_eps": 1e-3}), "f", "f")


def test_field_that_only_the_checkpoint_knows_is_returned():
  old = saved()
  old["model"]["gone"], old["more"], old["log"] = 3, {"a": {"b": [1]}}, "flat"
  assert sorted(check_compatible(old, make(), "f", "f")) == [
    ("log", "flat", None), ("model.gone", 3, None), ("more.a.b", [1], None)
  ]  # fmt: skip
