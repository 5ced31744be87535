import numpy as np
import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import load_config
from deepseek_jax.scaling.counting import count_params, moe_stats, nonembedding_flops_per_token
from deepseek_jax.scaling.shapes import MoEVariant, find_shape


@pytest.mark.parametrize(
  ("name", "seq", "scales"), [("7b", 4096, (3e7, 5e11)), ("small_dense", 128, (4.5e4, 1e8)), ("v3", 4096, (5e7, 1e11))]
)
def test_shapes_are_within_20_percent_of_a_log_grid(name, seq, scales):
  base = load_config(name).model
  for scale in np.geomspace(*scales, 12):
    model = find_shape(base, seq, float(scale))
    assert abs(nonembedding_flops_per_token(model, seq=seq) / scale - 1) <= 0.2
    a = model.attention
    assert model.embed % (a.head_dim if a.kind == "gqa" else a.v_head_dim) == 0
    model.check()


def test_the_shape_of_a_7b_is_near_deepseek_s():
  model = find_shape(load_config("7b").model, 4096, 4.2279e10)
  assert (model.layers, model.embed) == pytest.approx((30, 4096), rel=0.2)
  assert model.mlp == pytest.approx(8 / 3 * model.embed, rel=0.02) and model.attention.head_dim == 128


def test_no_shape_is_none():
  assert find_shape(load_config("7b").model, 4096, 10.0) is None
  assert find_shape(load_config("7b").model, 4096, 1e18) is None


def test_ladders_of_experts_keep_the_active_size():
  base = load_config("small").model
  scale, active = 3e6, []
  for experts, granularity in ((8, 2), (8, 4), (32, 4)):
    model = find_shape(base, 128, scale, MoEVariant(experts, granularity))
    assert model.moe.num_routed_experts == experts
    assert model.moe.num_experts_per_token + model.moe.num_shared_experts == granularity
    assert moe_stats(model).granularity == pytest.approx(granularity, rel=0.2)
    active.append(count_params(model).active_nonembedding)
    assert nonembedding_flops_per_token(model, seq=128) == pytest.approx(scale, rel=0.2)
  assert max(active) / min(active) < 1.4


def test_experts_of_a_dense_base_are_refused():
  with pytest.raises(ConfigError, match="need a base config with model.moe.num_routed_experts"):
    find_shape(load_config("7b").model, 4096, 1e9, MoEVariant(8))
