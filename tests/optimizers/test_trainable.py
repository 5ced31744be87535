"""Which parameters are trained: the two trees, and patterns that match nothing."""

import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.optimizers.trainable import check_trainable, merge_params, split_trainable

PARAMS = {"embed": 1, "moe_layers": {"attn": {"q": {"kernel": 2}, "k": {"kernel": 3}}, "norm": {"scale": 4}}}


def test_the_two_trees_make_up_the_whole():
  trainable, frozen = split_trainable(PARAMS, ("moe_layers/attn/*", "*/scale"))
  assert trainable == {"moe_layers": PARAMS["moe_layers"]} and frozen == {"embed": 1}
  trainable, frozen = split_trainable(PARAMS, ("*/q/*",))
  assert trainable == {"moe_layers": {"attn": {"q": {"kernel": 2}}}} and merge_params(trainable, frozen) == PARAMS
  assert split_trainable(PARAMS, ()) == (PARAMS, {})
  assert split_trainable(PARAMS["moe_layers"], ("moe_layers/norm/*",), "moe_layers")[0] == {"norm": {"scale": 4}}


def test_a_pattern_that_matches_no_parameter_is_an_error_with_paths_that_there_are():
  with pytest.raises(ConfigError, match=r"optimizer.trainable='attn' matches no parameter.*moe_layers/attn/k/kernel"):
    check_trainable(PARAMS, ("embed", "attn"))
