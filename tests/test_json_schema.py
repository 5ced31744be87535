"""The JSON Schema of a config accepts what from_dict accepts, and refuses what it refuses."""

import json

import jsonschema
import pytest

from deepseek_jax import train
from deepseek_jax.config import Config
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import load_config, shipped_configs
from deepseek_jax.json_schema import config_schema
from deepseek_jax.schema import flatten_config, from_dict, leaf_paths
from tests.golden_configs import golden_dumps


def nested(path, value):
  """{"a": {"b": value}} of "a.b"."""
  for name in reversed(path.split(".")):
    value = {name: value}
  return value


def accepts(tree):
  return jsonschema.Draft202012Validator(config_schema()).is_valid(tree)


def from_dict_accepts(tree):
  try:
    from_dict(Config, tree)
  except ConfigError:
    return False
  return True


def test_it_is_a_schema_and_has_every_field():
  schema = config_schema()
  jsonschema.Draft202012Validator.check_schema(schema)
  defaults = flatten_config(Config())
  for path, field in leaf_paths(Config).items():
    leaf = schema
    for name in path.split("."):
      assert leaf["additionalProperties"] is False
      leaf = leaf["properties"][name]
    assert leaf["description"] == field.metadata["doc"]
    assert leaf["default"] == json.loads(json.dumps(defaults[path]))
    items = leaf.get("items", leaf)
    assert list(items.get("enum", ())) == list(field.metadata.get("choices", ())), path
  assert accepts(json.loads(json.dumps({path: value for path, value in defaults.items() if "." not in path})))


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configs_are_valid(name):
  tree = {}
  for path, value in golden_dumps()[name].items():
    *sections, leaf = path.split(".")
    section = tree
    for part in sections:
      section = section.setdefault(part, {})
    section[leaf] = value
  assert tree["name"] == name and accepts(tree) and from_dict_accepts(tree)


@pytest.mark.parametrize(
  ("path", "value", "valid"),
  [
    ("train.steps", 3, True),
    ("train.steps", 3.0, True),
    ("train.steps", 3.5, False),
    ("train.steps", True, False),
    ("train.steps", "many", False),
    ("train.steps", None, False),
    ("train.steps", [3], False),
    ("train.stepz", 3, False),
    ("seed", 2**32 - 1, True),
    ("seed", 2**32, False),
    ("seed", -1, False),
    ("schedule.peak", 1, True),
    ("schedule.peak", 1e-9, True),
    ("schedule.peak", 0, False),
    ("schedule.peak", False, False),
    ("data.heldout_fraction", 0.5, True),
    ("data.heldout_fraction", 1, False),
    ("sample.top_p", 1, True),
    ("sample.top_p", 1.1, False),
    ("data.verify", False, True),
    ("data.verify", 0, False),
    ("data.verify", "yes", False),
    ("data.sources", ["a", "b"], True),
    ("data.sources", [3], False),
    ("data.sources", {"a": "b"}, False),
    ("mtp.weights", [0], True),
    ("mtp.weights", [-1], False),
    ("mtp.weights", ["a"], False),
    ("mesh.fsdp", -2, False),
    ("model.remat", "dots", True),
    ("model.remat", "some", False),
    ("model.remat", "Dots", False),
    ("model.attention.kind", "gqa", True),
    ("model.attention.kind", "mqa", False),
    ("model.fp8.block", 256, True),
    ("model.fp8.block", 200, False),
    ("model.atention.heads", 3, False),
    ("model", 3, False),
    ("model", [], False),
    ("model", {}, True),
    ("steps", 3, False),
    ("$ref", "x", False),
    ("name", "a/b", True),
    ("name", "a b.c", True),
    ("name", "...", True),
    ("name", "größe", True),
    ("name", "", False),
    ("name", " ", False),
    ("name", "/a", False),
    ("name", "a/", False),
    ("name", "a//b", False),
    ("name", ".", False),
    ("name", "a/../b", False),
    ("name", "../b", False),
    ("name", "a\n", False),
    ("name", "a\tb", False),
    ("name", 3, False),
  ],
)
def test_it_agrees_with_from_dict(path, value, valid):
  tree = nested(path, value)
  assert (accepts(tree), from_dict_accepts(tree)) == (valid, valid)


@pytest.mark.parametrize(("path", "text"), [("train.steps", "1e3"), ("data.verify", "true"), ("mtp.weights", "0.3")])
def test_text_of_the_command_line_is_for_from_dict_alone(path, text):
  assert from_dict_accepts(nested(path, text)) and not accepts(nested(path, text))


def test_a_file_may_name_its_schema_and_nothing_else_unknown(tmp_path):
  tree = {"$schema": "./config.schema.json", "train": {"steps": 7}}
  assert accepts(tree) and not accepts({"$schema": 3})
  (tmp_path / "mine.json").write_text(json.dumps(tree))
  assert load_config(str(tmp_path / "mine.json")).train.steps == 7
  for wrong in ({"$schema": 3}, {"$id": "x"}, {"train": {"$schema": "x"}}):
    (tmp_path / "mine.json").write_text(json.dumps(wrong))
    with pytest.raises(ConfigError, match="unknown config field"):
      load_config(str(tmp_path / "mine.json"))


def test_the_program_prints_it_without_a_config(capsys):
  assert train.main(["train", "--schema"]) == 0
  assert json.loads(capsys.readouterr().out) == config_schema()
