"""config.json in the layouts that exist, defaults of what it leaves out, refusals, and the way back."""

import dataclasses
import json

import pytest

from deepseek_jax.checkpoint.hf_config import to_hf_config
from deepseek_jax.checkpoint.hf_model import to_model_config
from deepseek_jax.errors import CheckpointError
from deepseek_jax.model_config import AttentionConfig, ModelConfig, MoEConfig, YarnConfig

SHAPE = {
  "vocab_size": 128, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip
MLA = {"q_lora_rank": 40, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
MOE = {
  "moe_intermediate_size": 24, "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4,
  "first_k_dense_replace": 1,
}  # fmt: skip
YARN = {
  "factor": 40, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1, "mscale": 1.3, "mscale_all_dim": 0.6,
}  # fmt: skip
V2 = {"model_type": "deepseek_v2", **SHAPE, **MLA, **MOE, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}
V3 = {"model_type": "deepseek_v3", **SHAPE, **MLA, **MOE, "n_group": 4, "topk_group": 2}
V1 = {"model_type": "deepseek", **SHAPE, **MOE}
LLAMA = {"model_type": "llama", **SHAPE}


def read(raw, names=()):
  return to_model_config(raw, names, "config.json")


def test_v3_in_the_published_layout():
  config = read(V3 | {"rope_theta": 5000, "rope_scaling": {"type": "yarn", **YARN}})
  assert config == ModelConfig(
    vocab=128, embed=64, layers=3, first_dense_layers=1, mlp=160, init_std=0.02,
    attention=AttentionConfig(
      kind="mla", heads=4, rope_theta=5000.0, q_lora_rank=40, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
      v_head_dim=12, yarn=YarnConfig(factor=40.0, original_seq=32, mscale=1.3, mscale_all_dim=0.6),
    ),
    moe=MoEConfig(
      num_routed_experts=16, num_shared_experts=1, num_experts_per_token=4, mlp=24, score="sigmoid", num_expert_groups=4,
      topk_groups=2, group_score="top2_sum", router_bias=True, norm_topk_prob=True, route_scale=2.5,
    ),
  )  # fmt: skip


def test_both_layouts_are_one_config():
  published = V3 | {"rope_theta": 5000, "rope_scaling": {"type": "yarn", **YARN}}
  transformers_5 = V3 | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5000, **YARN}}
  assert read(published) == read(transformers_5)
  assert read(V3 | {"rope_scaling": None}) == read(V3 | {"rope_parameters": {"rope_type": "default"}})


def test_keys_left_out_are_those_of_the_released_models():
  v3, v2, llama = (read({"model_type": kind, **more}) for kind, more in (
    ("deepseek_v3", {}), ("deepseek_v2", {"num_experts_per_tok": 6}), ("llama", {}),
  ))  # fmt: skip
  assert (v3.layers, v3.first_dense_layers, v3.attention.heads, v3.moe.num_routed_experts) == (61, 3, 128, 256)
  assert (v3.moe.num_expert_groups, v3.moe.topk_groups, v3.moe.route_scale) == (8, 4, 2.5)
  assert (v2.attention.q_lora_rank, v2.moe.num_routed_experts, v2.first_dense_layers) == (1536, 64, 0)
  assert (llama.attention.head_dim, llama.attention.kv_heads, llama.vocab) == (128, 32, 32000)


def test_null_is_not_a_default():
  assert read(V3 | {"q_lora_rank": None}).attention.q_lora_rank == 0
  assert read(V1 | {"n_shared_experts": None}).moe.num_shared_experts == 0


def test_v2_groups_count_only_when_the_method_has_them():
  greedy, limited = (read(V2 | {"topk_method": m}).moe for m in ("greedy", "group_limited_greedy"))
  assert (greedy.num_expert_groups, greedy.topk_groups) == (1, 1)
  assert (limited.num_expert_groups, limited.topk_groups, limited.group_score) == (4, 2, "max")
  assert greedy.route_scale == 16.0 and greedy.score == "softmax" and not greedy.router_bias


def test_norm_topk_prob_counts_where_the_reference_reads_it():
  on = {"norm_topk_prob": True}
  assert not read(V2 | on).moe.norm_topk_prob
  assert read(V1 | on).moe.norm_topk_prob and read(V3 | on).moe.norm_topk_prob
  assert not read(V3 | {"norm_topk_prob": False}).moe.norm_topk_prob
  assert not read(V1 | on | {"num_experts_per_tok": 1}).moe.norm_topk_prob


def test_llama_has_its_own_head_dim_and_key_heads():
  attention = read(LLAMA | {"head_dim": 24, "num_key_value_heads": 2}).attention
  assert (attention.kind, attention.head_dim, attention.kv_heads) == ("gqa", 24, 2)


def test_yarn_without_mscale_is_absent_not_one():
  yarn = read(V3 | {"rope_scaling": {"type": "yarn", "factor": 4}, "max_position_embeddings": 100}).attention.yarn
  assert (yarn.mscale, yarn.mscale_all_dim, yarn.original_seq) == (0.0, 0.0, 100)


def test_depth_of_multi_token_prediction_is_what_the_tensors_say():
  claims = V3 | {"num_nextn_predict_layers": 1}
  assert read(claims, ["model.layers.2.mlp.gate.weight"]).num_mtp_layers == 0
  assert read(V3, [f"model.layers.{n}.enorm.weight" for n in (0, 3, 4)]).num_mtp_layers == 2
  strays = ["model.layers.1000000.enorm.weight", "model.layers.4.mlp.gate.weight"]
  assert read(V3, ["model.layers.3.enorm.weight", *strays]).num_mtp_layers == 1


@pytest.mark.parametrize(
  ("raw", "message"),
  [
    ({"model_type": "qwen2"}, "model_type='qwen2' is not supported; llama, deepseek"),
    (LLAMA | {"rope_scaling": {"type": "linear", "factor": 4}}, "'linear'"),
    (LLAMA | {"rope_parameters": {"rope_type": "llama3"}}, "'llama3'"),
    (V3 | {"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": 1.0}}, "attention_factor"),
    (V3 | {"rope_scaling": {"type": "yarn"}}, "factor"),
    (V3 | {"attention_bias": True, "hidden_act": "gelu"}, "hidden_act='gelu'.*attention_bias=True"),
    (LLAMA | {"mlp_bias": True}, "mlp_bias"),
    (V1 | {"moe_layer_freq": 2}, "moe_layer_freq=2"),
    (V3 | {"rope_interleave": False}, "rope_interleave"),
    (V3 | {"scoring_func": "softmax"}, "scoring_func"),
    (V3 | {"num_key_value_heads": 2}, "num_key_value_heads=2"),
    (V3 | {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    (V3 | {"quantization_config": "fp8"}, "config.json: a value is not of the type"),
    ({"model_type": ["x"]}, "model_type=.'x'. is not supported"),
    (V1 | {"head_dim": 24}, "head_dim=24"),
    (V3 | {"n_group": 5}, "config.json: model.moe.num_routed_experts=16 does not fit"),
    (LLAMA | {"hidden_size": "wide"}, "config.json"),
  ],
)
def test_what_is_not_supported_is_one_error(raw, message):
  with pytest.raises(CheckpointError, match=message):
    read(raw)


@pytest.mark.parametrize(
  "raw",
  [LLAMA, LLAMA | {"head_dim": 24}, V1, V1 | {"head_dim": 16}, V2, V2 | {"topk_method": "group_limited_greedy"}, V3, V3 | {"q_lora_rank": None},
   V3 | {"rope_scaling": {"type": "yarn", **YARN}}, V2 | {"rope_scaling": {"type": "yarn", "factor": 8}}],
)  # fmt: skip
def test_written_configs_come_back(raw):
  config = read(raw)
  assert read(to_hf_config(config, "bfloat16")) == config
  assert read(to_hf_config(config, "bfloat16", raw)) == config


def test_written_file_is_the_published_layout(tmp_path):
  original = V3 | {
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, **YARN}, "dtype": "float32", "eos_token_id": 7,
    "quantization_config": {"quant_method": "fp8"},
  }  # fmt: skip
  raw = json.loads(json.dumps(to_hf_config(read(original), "bfloat16", original)))
  (tmp_path / "config.json").write_text(json.dumps(raw))
  assert raw["architectures"] == ["DeepseekV3ForCausalLM"] and raw["torch_dtype"] == "bfloat16"
  assert raw["rope_scaling"]["type"] == "yarn" and raw["eos_token_id"] == 7 and raw["topk_method"] == "noaux_tc"
  assert not {"quantization_config", "rope_parameters", "dtype"} & set(raw)
  assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_model_that_hugging_face_has_no_class_for_is_refused():
  v2 = read(V2)
  with pytest.raises(CheckpointError, match="model.moe.norm_topk_prob=True"):
    to_hf_config(dataclasses.replace(v2, moe=dataclasses.replace(v2.moe, norm_topk_prob=True)), "float32")
  attention = dataclasses.replace(v2.attention, latent_norm_eps=1e-5)
  with pytest.raises(CheckpointError, match="latent_norm_eps=1e-05"):
    to_hf_config(dataclasses.replace(v2, attention=attention), "float32")
  for raw in (LLAMA, V3):
    model = read(raw)
    with pytest.raises(CheckpointError, match="model.attention.window=8 cannot be expressed"):
      to_hf_config(dataclasses.replace(model, attention=dataclasses.replace(model.attention, window=8)), "float32")
  hashed = dataclasses.replace(v2.moe, router="hash", topk_groups=v2.moe.num_expert_groups)
  with pytest.raises(CheckpointError, match="model.moe.router=hash has no Hugging Face format, only topk has"):
    to_hf_config(dataclasses.replace(v2, moe=hashed), "float32")
  v1 = read(V1)
  with pytest.raises(CheckpointError, match="head_dim=24"):
    to_hf_config(dataclasses.replace(v1, attention=dataclasses.replace(v1.attention, head_dim=24)), "float32")
  # What only training sees is no reason.
  moe = dataclasses.replace(v2.moe, dispatch="dense")
  assert to_hf_config(dataclasses.replace(v2, dropout=0.1, moe=moe), "float32")["model_type"] == "deepseek_v2"
