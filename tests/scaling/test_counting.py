import dataclasses

import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import load_config
from deepseek_jax.scaling.counting import (
  count_params,
  deepseek_flops_per_token,
  moe_stats,
  nonembedding_flops_per_token,
)


@pytest.mark.parametrize(
  ("layers", "embed", "flops"),
  [(8, 512, 352.3e6), (12, 768, 962.6e6), (24, 1024, 3.020e9), (24, 2048, 9.664e9), (32, 4096, 45.10e9),
   (40, 5120, 85.56e9), (80, 8192, 418.8e9)],
)  # fmt: skip
def test_the_paper_s_model_scales(layers, embed, flops):
  assert deepseek_flops_per_token(layers, embed, 4096) == pytest.approx(flops, rel=2e-4)


@pytest.mark.parametrize(("name", "compute"), [("7b", 8.456e22), ("67b", 9.946e23)])
def test_compute_of_deepseek_llm(name, compute):
  assert nonembedding_flops_per_token(load_config(name)) * 2e12 == pytest.approx(compute, rel=2e-4)


def test_exact_counts_equal_the_formula_where_the_model_is_as_the_formula_takes_it():
  config = load_config("7b", {"model.mlp": 10_923})  # 8/3 of 4,096, rounded
  exact = nonembedding_flops_per_token(config, "exact")
  assert exact == pytest.approx(nonembedding_flops_per_token(config, "deepseek"), rel=1e-4)


def test_exact_counts_of_mla_and_experts_by_hand():
  config = load_config("v2_lite")
  model, a, moe, seq = config.model, config.model.attention, config.model.moe, config.data.seq
  d, qk = model.embed, a.qk_nope_head_dim + a.qk_rope_head_dim
  attention = d * a.heads * qk + d * (a.kv_lora_rank + a.qk_rope_head_dim)
  attention += a.kv_lora_rank * a.heads * (a.qk_nope_head_dim + a.v_head_dim) + a.heads * a.v_head_dim * d
  experts = 3 * d * moe.mlp * (moe.num_experts_per_token + moe.num_shared_experts) + d * moe.num_routed_experts
  matrices = model.layers * attention + 3 * d * model.mlp + (model.layers - 1) * experts
  pairs = 6 * seq * a.heads * (qk + a.v_head_dim) * model.layers
  assert nonembedding_flops_per_token(config, "exact") == 6 * matrices + pairs
  assert nonembedding_flops_per_token(config) == nonembedding_flops_per_token(config, "exact")


def test_chinchilla_counts_what_its_appendix_counts():
  config = load_config("7b")
  d, layers, seq, vocab, heads = 4096, 30, 4096, 102_400, 32
  forward = layers * (2 * 4 * d * d + 2 * 2 * seq * d + 3 * heads * seq + 2 * 3 * d * 11_008) + 2 * 2 * d * vocab
  assert nonembedding_flops_per_token(config, "chinchilla") == 3 * forward


def test_parameters_with_and_without_vocabulary_and_idle_experts():
  params = count_params(load_config("v3"))
  assert params.total == 671_026_419_200 and params.active == 37_552_297_472
  assert params.total - params.nonembedding == params.active - params.active_nonembedding == 2 * 129_280 * 7168
  assert nonembedding_flops_per_token(load_config("v3"), "6N") == 6 * params.active_nonembedding
  tied = load_config("tiny_dense", {"model.tied_embeddings": True})
  assert count_params(tied).total - count_params(tied).nonembedding == tied.model.vocab * tied.model.embed


def test_ratios_of_a_mixture_of_experts():
  granularity, sparsity, activation_ratio = moe_stats(load_config("v3"))
  assert granularity == pytest.approx(8 / 3 * 7168 / 2048)
  assert sparsity == pytest.approx(1 - 8 / 256) and activation_ratio == pytest.approx(9 / 257)
  with pytest.raises(ConfigError, match="num_routed_experts is 0"):
    moe_stats(load_config("7b"))


def test_errors_name_what_is_missing():
  model = load_config("7b").model
  with pytest.raises(ConfigError, match="expected one of deepseek"):
    nonembedding_flops_per_token(model, "kaplan", 4096)
  with pytest.raises(ConfigError, match="needs seq"):
    nonembedding_flops_per_token(model)
  window = dataclasses.replace(model, attention=dataclasses.replace(model.attention, window=64))
  assert nonembedding_flops_per_token(window, "exact", 4096) < nonembedding_flops_per_token(model, "exact", 4096)
