"""Old names of config fields: the table fits the config, and files of runs are read through it."""

import copy

from deepseek_jax.config import Config
from deepseek_jax.renamed_fields import RENAMED_FIELDS, with_current_names
from deepseek_jax.schema import leaf_paths


def test_every_line_leads_from_a_name_that_is_gone_to_a_field_of_the_same_section():
  fields = leaf_paths(Config)
  for old, new in RENAMED_FIELDS.items():
    assert old not in fields and new in fields
    assert old.rpartition(".")[0] == new.rpartition(".")[0]


def test_a_saved_config_is_renamed_at_any_depth_and_nothing_else_changes():
  saved = {
    "parallel": {"circuits": 2, "zero": 3},
    "model": {"moe": {"capacity_exempt": 0.5}, "circuits": 7},
    "name": "x",
  }
  before = copy.deepcopy(saved)
  assert with_current_names(saved) == {
    "parallel": {"virtual_stages": 2, "zero": 3}, "model": {"moe": {"no_drop_fraction": 0.5}, "circuits": 7}, "name": "x",
  }  # fmt: skip
  assert saved == before
