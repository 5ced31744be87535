"""config.json in the layouts that exist, defaults of what it leaves out, refusals, and the way back."""

import dataclasses
import json

import pytest

from deepseek_jax.checkpoint.hf_config import to_hf_config
from deepseek_jax.checkpoint.hf_keys import HF_KEYS, unknown_keys
from deepseek_jax.checkpoint.hf_model import (
  DEFAULTS,
  NOT_IMPLEMENTED,
  SUPPORTED_VALUES,
  read_config_json,
  to_model_config,
)
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
  assert not read(V2 | on | {"num_experts_per_tok": 1}).moe.norm_topk_prob  # no code normalizes one weight
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
  assert read(claims, ["model.layers.2.mlp.gate.weight"]).num_mtp_layers == 0  # transformers writes 1 everywhere
  assert read(claims, ["model.layers.3.enorm.weight"]).num_mtp_layers == 1
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
    (
      V3 | {"num_nextn_predict_layers": 2},
      "num_nextn_predict_layers=2 .the files hold 0 of them, from model.layers.3 on",
    ),
    (V2 | {"norm_topk_prob": True}, "norm_topk_prob=True .*routed_scaling_factor"),
    (V3 | {"qk_head_dim": 25}, "qk_head_dim=25 .it is the sum of"),
    (V3 | {"num_local_experts": 8}, "num_local_experts=8 .*n_routed_experts, which is 16"),
    (LLAMA | {"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config=.*only false, null or empty"),
    (LLAMA | {"num_attention_heads": 5}, "hidden_size=64 without head_dim .*num_attention_heads=5"),
    (V3 | {"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "quantization_config=.*e5m2"),
    ({"model_type": ["x"]}, "model_type=.'x'. is not supported"),
    (V1 | {"head_dim": 24}, "head_dim=24"),
    (V3 | {"n_group": 5}, "config.json: model.moe.num_routed_experts=16 does not fit"),
  ],
)
def test_what_is_not_supported_is_one_error(raw, message):
  with pytest.raises(CheckpointError, match=message):
    read(raw)


@pytest.mark.parametrize(
  ("more", "message"),
  [
    ({"rope_theta": 500, "rope_parameters": {"rope_theta": 700}}, "rope_theta is 500 in config.json itself and 700 in rope_p"),
    ({"rope_scaling": {"type": "yarn", **YARN}, "rope_parameters": {"rope_type": "yarn", **YARN, "factor": 8}},
     "factor is 8 in rope_parameters and 40 in rope_scaling"),
    ({"rope_scaling": {"type": "yarn", **YARN}, "rope_parameters": {"rope_theta": 500.0}},
     "rope_theta is 500.0 in rope_parameters and 10000.0 in the default"),
    ({"rope_scaling": {"type": "yarn", "factor": 4}, "rope_parameters": {"rope_type": "default"}}, "rope_type is 'default'"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 500.0}}}, "objects .full_attention."),
    ({"rope_scaling": {"type": "yarn", "rope_type": "default", **YARN}}, "rope_type='default' and type='yarn': remove one"),
    ({"rope_scaling": YARN}, "factor=40 without rope_type or type"),
    ({"rope_scaling": {"type": "yarn", **YARN}, "original_max_position_embeddings": 64},
     "original_max_position_embeddings is 64 in config.json itself and 32"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
  ],
)  # fmt: skip
def test_rope_that_would_not_be_read_is_refused(more, message):
  with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
    read(V3 | more)


def test_rope_that_agrees_with_itself_may_be_given_twice():
  scaling = {"type": "yarn", "rope_type": "yarn", **YARN}
  twice = V3 | {"rope_theta": 5000, "rope_scaling": scaling, "rope_parameters": {**scaling, "rope_theta": 5000.0}}
  assert read(twice) == read(V3 | {"rope_theta": 5000, "rope_scaling": scaling})


@pytest.mark.parametrize(
  ("raw", "key", "value"),
  [
    (LLAMA, "hidden_size", "wide"), (LLAMA, "hidden_size", 64.0), (LLAMA, "num_hidden_layers", True),
    (LLAMA, "num_hidden_layers", -1), (LLAMA, "num_attention_heads", 0), (LLAMA, "vocab_size", None),
    (LLAMA, "rms_norm_eps", "1e-6"), (LLAMA, "rms_norm_eps", float("nan")), (LLAMA, "tie_word_embeddings", "true"),
    (LLAMA, "num_key_value_heads", [4]), (LLAMA, "attention_dropout", -0.1), (LLAMA, "bos_token_id", "<s>"),
    (LLAMA, "rope_theta", 0), (LLAMA, "rope_scaling", "yarn"), (V3, "rope_parameters", []), (V3, "q_lora_rank", "40"),
    (V3, "n_group", 0), (V3, "routed_scaling_factor", None), (V3, "norm_topk_prob", 1), (V2, "kv_lora_rank", {}),
    (V1, "n_shared_experts", 1.5), (V3, "num_nextn_predict_layers", "1"), (V2, "topk_method", 3),
  ],
)  # fmt: skip
def test_a_value_of_another_type_is_named_with_its_key(raw, key, value):
  with pytest.raises(CheckpointError) as error:
    read(raw | {key: value})
  assert f": {key}={value!r} (expected " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("key", "value"), [("rope_theta", 0), ("factor", "40"), ("factor", 0), ("beta_fast", 0), ("truncate", 1)]
)
def test_so_is_one_inside_rope_scaling(key, value):
  with pytest.raises(CheckpointError, match=f"rope_scaling.{key}={value!r} .expected "):
    read(V3 | {"rope_scaling": {"type": "yarn", **YARN, key: value}})


def test_all_values_of_another_type_are_one_error():
  with pytest.raises(CheckpointError, match=r"hidden_size='a' .*; v_head_dim=0 .*; rope_scaling\.factor='b' "):
    read(V3 | {"hidden_size": "a", "rope_scaling": {"type": "yarn", "factor": "b"}, "v_head_dim": 0})


# Of config.json as it lies beside the weights of DeepSeek-V3 (published keys), with sizes of ours.
PUBLISHED_V3 = V3 | {
  "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
  "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha": 0.001, "bos_token_id": 0,
  "eos_token_id": 1, "ep_size": 1, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 163840,
  "moe_layer_freq": 1, "norm_topk_prob": True, "num_key_value_heads": 4, "num_nextn_predict_layers": 1,
  "pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_scaling": {"type": "yarn", **YARN}, "rope_theta": 10000,
  "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False,
  "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True,
  "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip
# What transformers 5 writes for the same model.
WRITTEN_BY_TRANSFORMERS = {key: value for key, value in PUBLISHED_V3.items() if not key.startswith("rope_")} | {
  "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, **YARN}, "dtype": "bfloat16", "head_dim": 8,
  "qk_head_dim": 24, "rope_interleave": True, "pad_token_id": None, "output_hidden_states": False, "return_dict": True,
  "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": None, "chunk_size_feed_forward": 0,
}  # fmt: skip


@pytest.mark.parametrize(
  "raw", [PUBLISHED_V3, WRITTEN_BY_TRANSFORMERS, LLAMA, V1, V2], ids=("v3", "t5", "llama", "v1", "v2")
)
def test_keys_of_released_files_are_known(raw):
  assert unknown_keys(raw, raw["model_type"]) == []
  read(raw, ["model.layers.3.enorm.weight"] if raw["model_type"] == "deepseek_v3" else ())


def test_unknown_keys_are_those_that_no_code_reads_for_the_model():
  more = {
    "sliding_window": 4096,
    "use_sliding_window": None,
    "rope_scaling": {"type": "yarn", **YARN, "low_freq_factor": 1},
  }
  assert unknown_keys(V3 | more, "deepseek_v3") == ["sliding_window", "rope_scaling.low_freq_factor"]
  assert unknown_keys(LLAMA | MOE, "llama") == list(MOE)
  assert read(LLAMA | MOE).moe.num_routed_experts == 0


def test_every_key_with_a_default_is_in_the_table_and_each_use_is_one_of_three():
  for kind, defaults in DEFAULTS.items():
    assert unknown_keys({key: 1 for key in defaults if key not in ("mlp_bias", "topk_method")}, kind) == []
  assert {row.use for row in HF_KEYS.values()} == {"honoured", "checked", "irrelevant"}
  assert set(SUPPORTED_VALUES) | set(NOT_IMPLEMENTED) <= {key for key, row in HF_KEYS.items() if row.use == "checked"}


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


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"\xff", b'{"model_type": '])
def test_a_file_that_is_no_object_is_one_error(tmp_path, content):
  (tmp_path / "config.json").write_bytes(content)
  with pytest.raises(CheckpointError, match="config.json (cannot be read|holds list)") as error:
    read_config_json(tmp_path)
  assert "\n" not in str(error.value)
