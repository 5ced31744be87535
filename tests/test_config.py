"""The config's door: types, ranges, unknown keys and combinations of fields."""

import pytest

from deepseek_jax import config
from deepseek_jax.config import Config
from deepseek_jax.errors import ConfigError
from deepseek_jax.model_config import AttentionConfig
from deepseek_jax.schema import from_dict, leaf_paths, table_argument
from deepseek_jax.training.router_bias import BIAS_RULES

MOE = {"num_routed_experts": 8, "num_experts_per_token": 2, "mlp": 4}
MLA = {"kind": "mla", "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}


def test_every_field_has_a_line_of_doc():
  assert all(field.metadata["doc"] and "\n" not in field.metadata["doc"] for field in leaf_paths(Config).values())


@pytest.mark.parametrize(
  ("tree", "words"),
  [
    ({"train": {"stepz": 3}}, ["'train.stepz'", "did you mean 'train.steps'"]),
    ({"parallel": {"circuits": 2}}, ["'parallel.circuits' is now 'parallel.virtual_stages'"]),
    ({"model": {"attention": {"kind": "mla", "kv_lora_rank": 8}}}, ["kind=mla needs model.attention.qk_nope_head_dim"]),
    (
      {"model": {"attention": {"implementation": "pallas", "dropout": 0.1}}},
      ["dropout=0.1", "kernels have no dropout"],
    ),
    (
      {"model": {"attention": {"implementation": "pallas", "kv_comm": "ring"}}},
      ["kv_comm=ring", "need gather"],
    ),
    (
      {"model": {"first_dense_layers": 1}},
      ["model.first_dense_layers=1", "set model.first_dense_layers=0 in a dense model"],
    ),
    ({"model": {"moe": {"num_routed_experts": 8, "mlp": 4}}}, ["needs model.moe.num_experts_per_token"]),
    ({"model": {"moe": {**MOE, "num_expert_groups": 3}}}, ["num_routed_experts=8", "num_expert_groups=3"]),
    ({"model": {"moe": {**MOE, "num_expert_groups": 8, "topk_groups": 8, "group_score": "top2_sum"}}}, ["two experts"]),
    ({"model": {"moe": {**MOE, "topk_groups": 2}}}, ["topk_groups=2 is above model.moe.num_expert_groups=1"]),
    ({"model": {"moe": {**MOE, "num_expert_groups": 8}}}, ["num_experts_per_token=2", "1 of 8 groups hold 1 experts"]),
    ({"model": {"moe": {**MOE, "dispatch": "capacity"}}}, ["dispatch=capacity", "set model.moe.num_expert_groups"]),
    (
      {"model": {"moe": {**MOE, "router": "hash", "router_bias": True}}},
      ["router=hash", "set model.moe.router_bias=false"],
    ),
    (
      {"model": {"moe": {**MOE, "router": "hash", "num_expert_groups": 4, "topk_groups": 2}}},
      ["topk_groups=2", "router=hash", "set model.moe.topk_groups=4"],
    ),
    (
      {"model": {"moe": {**MOE, "router": "hash"}}, "balance": {"expert_loss": 0.1}},
      ["balance.expert_loss", "router=hash", "set them to 0"],
    ),
    ({"model": {"attention": {"yarn": {"beta_fast": 1, "beta_slow": 32}}}}, ["beta_fast=1.0", "above beta_slow=32.0"]),
    ({"model": {"num_mtp_layers": 2}, "data": {"seq": 2}}, ["data.seq=2", "depth 2", "model.num_mtp_layers"]),
    (
      {"model": {"moe": MOE}, "balance": {"communication_loss": 0.1, "device_groups": 4}},
      ["num_expert_groups=1", "set balance.device_groups=0, or balance.communication_loss=0"],
    ),
    (
      {"balance": {"bias_update_rate": 0.1}},
      ["balance.bias_update_rate=0.1 needs model.moe.router_bias=true: set it"],
    ),
    ({"model": {"moe": MOE}, "balance": {"device_loss": 0.1}}, ["at least 2 equal groups of the 8 experts, got 1"]),
    ({"mtp": {"weights": (0.3, 0.1)}}, ["mtp.weights=(0.3, 0.1)", "one weight more than tokens"]),
    ({"model": {"moe": MOE}, "mesh": {"expert": 3}}, ["num_routed_experts=8", "mesh.expert=3"]),
    ({"model": {"atention": {"heads": 3}}}, ["model.atention", "model.attention"]),
    ({"steps": 3}, ["'steps'", ".steps'"]),
    ({"model": 3}, ["model is a section", "model.layers"]),
    ({"train": {"steps": 1.5}}, ["train.steps must be an integer", "1.5"]),
    ({"train": {"steps": "many"}}, ["train.steps must be an integer", "many"]),
    ({"train": {"steps": True}}, ["train.steps must be an integer, got True"]),
    ({"name": ""}, ["name must be a relative path of printable names inside runs/, got ''"]),
    ({"name": "../../x"}, ["inside runs/, got '../../x'"]),
    ({"name": "a/../../x"}, ["inside runs/"]),
    ({"name": "/x"}, ["inside runs/"]),
    ({"name": "a\nb"}, ["inside runs/"]),
    ({"name": "a" * 300}, ["inside runs/"]),
    (
      {"mesh": {"data": 2, "fsdp": 2}, "train": {"global_batch": 18}},
      ["=18 does not divide over mesh.data x mesh.fsdp=4: mesh.data x mesh.fsdp must be one of 1, 2, 3, 6, 9, 18, or"],
    ),
    ({"train": {"steps": 0}}, ["train.steps must be at least 1", "0"]),
    ({"schedule": {"peak": float("nan")}}, ["schedule.peak must be finite"]),
    ({"schedule": {"peak": -1.0}}, ["schedule.peak must be above 0"]),
    ({"model": {"remat": "some"}}, ["model.remat must be one of", "dots"]),
    ({"model": {"attention": {"heads": 6, "kv_heads": 4}}}, ["heads=6", "kv_heads=4"]),
    ({"model": {"attention": {"head_dim": 7}}}, ["head_dim=7", "even"]),
    ({"mesh": {"tensor": 3}}, ["model.attention.heads=4", "mesh.tensor=3", "1, 2, 4"]),
    ({"mesh": {"data": 3}}, ["train.global_batch=16", "=3", "1, 2, 4, 8, 16"]),
    ({"mesh": {"fsdp": 3, "data": 1}, "train": {"global_batch": 3}}, ["model.embed=128", "mesh.fsdp=3"]),
    (
      {"model": {"embed": 96, "attention": MLA}, "mesh": {"fsdp": 3, "data": 1}, "train": {"global_batch": 3}},
      ["model.attention.kv_lora_rank=8", "mesh.fsdp=3"],
    ),
    ({"mesh": {"fsdp": -1}}, ["only one mesh size may be -1"]),
    ({"mesh": {"tensor": 0}}, ["1 or more, or -1"]),
    ({"data": {"tokenizer": "deepseek-v3"}}, ["128815", "model.vocab=272"]),
    ({"data": {"sources": ("a", "b"), "weights": (1.0,)}}, ["data.weights has 1", "2 data.sources"]),
    ({"data": {"sources": ()}}, ["data.sources is empty"]),
    ({"mesh": {"context": 3}}, ["model.embed=128", "mesh.context=3"]),
    ({"mesh": {"context": 2}, "data": {"seq": 254}}, ["data.seq=254", "2 x mesh.context must be one of 2, 254, or"]),
    (
      {"mesh": {"context": 2}, "model": {"attention": {"dropout": 0.1}}},
      ["model.attention.dropout=0.1", "mesh.context=2"],
    ),
    ({"mesh": {"stage": 8}}, ["mesh.stage=8", "8 chunks of 4 layers"]),
    ({"mesh": {"stage": 2}, "parallel": {"virtual_stages": 4}}, ["parallel.virtual_stages=4", "8 chunks of 4 layers"]),
    ({"mesh": {"stage": 2}, "parallel": {"stage_layers": (3, 2)}}, ["stage_layers=(3, 2)", "5 layers", "4 in all"]),
    ({"mesh": {"stage": 2}, "parallel": {"zero": 2}}, ["parallel.zero=2", "set 1 or 3"]),
    ({"parallel": {"virtual_stages": 2}}, ["mesh.stage above 1"]),
    ({"mesh": {"fsdp": 2, "expert": 3}}, ["model.embed=128", "mesh.fsdp x mesh.expert=6"]),
    (
      {"model": {"moe": {"num_routed_experts": 4, "num_experts_per_token": 1, "mlp": 8, "buffer_factor": 0.5}}},
      ["overflows under an even load", "1 or more"],
    ),
    ({"train": {"microbatch": 5}}, ["global_batch=16", "microbatch=5", "use 15"]),
    ({"train": {"batch_ramp_from": 4, "batch_ramp_tokens": 9}}, ["batch_ramp_from=4", "global_batch=16", "microbatch"]),
    ({"optimizer": {"moments_dtype": "float64"}}, ["moments_dtype=float64", "param_dtype=float32"]),
    ({"train": {"batch_ramp_from": 16}}, ["go together"]),
    ({"schedule": {"kind": "multi_step"}}, ["multi_step takes 1 milestones"]),
    ({"schedule": {"kind": "wsd", "milestones": (0.5,), "factors": (0.1,)}}, ["wsd takes 2 milestones and 1 factors"]),
    ({"schedule": {"kind": "multi_step", "milestones": (0.9, 0.8), "factors": (0.3, 0.1)}}, ["must rise"]),
    ({"schedule": {"kind": "warmup_cosine", "factors": (0.1,), "warmup_tokens": 5}}, ["same unit"]),
    ({"model": {"param_dtype": "float64"}}, ["model.compute_dtype=bfloat16"]),
    (
      {
        "model": {"param_dtype": "float64", "compute_dtype": "float64", "precision": "fp8"},
        "optimizer": {"moments_dtype": "float64"},
      },
      ["model.precision=fp8", "set compute_dtype to bfloat16 or float32"],
    ),
    ({"model": {"moe": {**MOE, "dispatch": "dense"}, "precision": "fp8"}}, ["dispatch=dense", "set dispatch=ragged"]),
    ({"model": {"precision": "fp4"}}, ["model.precision must be one of", "fp8"]),
    ({"model": {"param_dtype": "float64", "compute_dtype": "float64"}}, ["optimizer.moments_dtype"]),
  ],
)
def test_bad_config_is_one_message(tree, words):
  with pytest.raises(ConfigError) as error:
    from_dict(Config, tree)
  message = str(error.value)
  assert "\n" not in message
  for word in words:
    assert word in message, message


def test_text_is_read_as_the_command_line_gives_it():
  config = from_dict(
    Config,
    {
      "train": {"steps": "1e3", "global_batch": "1_6"},
      "data": {"sources": "a,b", "weights": "(0.25, 0.75)", "mask_documents": "true"},
      "schedule": {"peak": "3e-4"},
    },
  )
  assert config.train.steps == 1000 and type(config.train.steps) is int
  assert config.train.global_batch == 16
  assert (
    config.data.sources == ("a", "b") and config.data.weights == (0.25, 0.75) and config.data.mask_documents is True
  )
  assert config.schedule.peak == 3e-4


def test_direct_construction_is_checked_too():
  with pytest.raises(ConfigError, match=r"model\.attention\.heads must be at least 1"):
    AttentionConfig(heads=0)
  assert Config() == from_dict(Config, {}) and hash(Config()) == hash(from_dict(Config, {}))


def test_a_free_mesh_axis_is_not_checked_before_devices_are_known():
  """16 sequences do not divide over 3 devices; over data = -1 they may."""
  assert from_dict(Config, {"mesh": {"data": -1, "tensor": 2}}).mesh.data == -1
  with pytest.raises(ConfigError, match="=3"):
    from_dict(Config, {"mesh": {"data": 3, "tensor": 2}})


def test_names_of_nested_folders_are_names():
  assert from_dict(Config, {"name": "sweep/lr 3e-4"}).name == "sweep/lr 3e-4"


def test_tuples_from_text():
  for text, weights in (("", ()), ("1, 2", (1.0, 2.0)), ("[1, 2]", (1.0, 2.0))):
    data = from_dict(Config, {"data": {"weights": text, "sources": "a, b"}}).data
    assert data.weights == weights and data.sources == ("a", "b")


@pytest.mark.parametrize(
  ("rules", "fix"),
  [
    ({"sign": ("quantile",), "other": ("topk",)}, "set balance.bias_rule=other"),
    ({"sign": ("quantile",)}, "no rule does; set model.moe.router_bias=false"),
  ],
)
def test_a_rule_that_does_not_serve_the_router_is_refused_where_that_has_a_bias(monkeypatch, rules, fix):
  monkeypatch.setattr(config, "BIAS_RULE_ROUTERS", rules)
  from_dict(Config, {"model": {"moe": MOE}})
  with pytest.raises(ConfigError, match=f"bias_rule=sign moves .*router=quantile, .*router=topk: {fix}"):
    from_dict(Config, {"model": {"moe": {**MOE, "router_bias": True}}})


def test_an_argument_of_the_rows_of_a_table_is_read_from_the_source():
  assert table_argument("training.router_bias", "BIAS_RULES", "routers") == {
    name: rule.routers for name, rule in BIAS_RULES.items()
  }
  with pytest.raises(LookupError, match="the row 'sign' has no keyword router"):
    table_argument("training.router_bias", "BIAS_RULES", "router")
