"""DeepSeek's ModelArgs files: what becomes of each key, and what is refused."""

import errno
import json
import math
import os

import pytest

from deepseek_jax.checkpoint.__main__ import main
from deepseek_jax.checkpoint.model_args import read_model_args
from deepseek_jax.errors import CheckpointError, ConfigError
from deepseek_jax.flags import load_config
from deepseek_jax.model.mla import softmax_scale

# As published beside the weights of V3.
V3 = {
  "vocab_size": 129280, "dim": 7168, "inter_dim": 18432, "moe_inter_dim": 2048, "n_layers": 61, "n_dense_layers": 3,
  "n_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "n_activated_experts": 8, "n_expert_groups": 8,
  "n_limited_groups": 4, "route_scale": 2.5, "score_func": "sigmoid", "q_lora_rank": 1536, "kv_lora_rank": 512,
  "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "dtype": "fp8",
}  # fmt: skip


def read(tmp_path, **args):
  path = tmp_path / "args.json"
  path.write_text(json.dumps(args))
  return read_model_args(path)


def test_v3(tmp_path):
  config, notes = read(tmp_path, **V3)
  model, attention, moe = config.model, config.model.attention, config.model.moe
  assert (model.vocab, model.embed, model.layers, model.mlp) == (129280, 7168, 61, 18432)
  assert (model.num_dense_layers, model.num_moe_layers, model.num_mtp_layers) == (3, 58, 0)
  assert (attention.kind, attention.heads, attention.q_lora_rank, attention.kv_lora_rank) == ("mla", 128, 1536, 512)
  assert (attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim) == (128, 64, 128)
  assert (moe.num_routed_experts, moe.num_shared_experts, moe.num_experts_per_token, moe.mlp) == (256, 1, 8, 2048)
  assert (moe.score, moe.num_expert_groups, moe.topk_groups, moe.group_score) == ("sigmoid", 8, 4, "top2_sum")
  assert moe.router_bias and moe.norm_topk_prob and moe.route_scale == 2.5
  assert math.isclose(softmax_scale(attention), 0.135234, rel_tol=1e-5)  # transformers' for V3's published config
  assert (config.name, config.data.tokenizer, config.data.seq) == ("args", "deepseek-v3", 16384)
  assert any("dtype='fp8'" in note for note in notes)


def test_what_a_file_leaves_out_is_the_16b_model_of_v2(tmp_path):
  config, _ = read(tmp_path)
  model, moe, yarn = config.model, config.model.moe, config.model.attention.yarn
  assert (model.vocab, model.embed, model.layers, model.first_dense_layers, model.mlp) == (102400, 2048, 27, 1, 10944)
  assert (moe.num_routed_experts, moe.num_shared_experts, moe.num_experts_per_token, moe.mlp) == (64, 2, 6, 1408)
  assert (moe.score, moe.group_score, moe.router_bias, moe.norm_topk_prob) == ("softmax", "max", False, False)
  assert (yarn.factor, yarn.original_seq, yarn.beta_fast, yarn.beta_slow) == (40, 4096, 32, 1)
  assert model.attention.q_lora_rank == 0 and config.data.tokenizer == "deepseek-llm"


def test_yarn_is_off_within_the_original_context(tmp_path):
  config, _ = read(tmp_path, max_seq_len=4096, mscale=0.707)
  assert config.model.attention.yarn.factor == 1 and config.data.seq == 4096
  config, _ = read(tmp_path, max_seq_len=4097, mscale=0.707)
  yarn = config.model.attention.yarn
  assert (yarn.factor, yarn.mscale, yarn.mscale_all_dim) == (40, 0.707, 0.707)


def test_the_router_bias_goes_by_width_as_in_their_code(tmp_path):
  config, notes = read(tmp_path, **V3 | {"dim": 2048})
  moe = config.model.moe
  assert (moe.router_bias, moe.group_score, moe.norm_topk_prob) == (False, "max", True)
  assert any("no router bias" in note for note in notes)


def test_everything_that_is_wrong_is_in_one_error(tmp_path):
  with pytest.raises(ConfigError) as caught:
    read(
      tmp_path,
      dims=1,
      n_layers="2",
      dim=True,
      route_scale=None,
      dtype="fp4",
      score_func="relu",
      n_heads=2.5,
      rope_theta=1,
    )
  message = str(caught.value)
  for words in (
    "dims: unknown", "n_layers must be an integer, got '2'", "dim must be an integer, got True",
    "route_scale must be a number, got None", "dtype must be one of 'bf16', 'fp8', got 'fp4'", "score_func must be",
    "n_heads must be an integer, got 2.5",
  ):  # fmt: skip
    assert words in message
  assert "rope_theta must" not in message  # an integer is a number


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_file_that_is_no_object(tmp_path, text):
  (tmp_path / "args.json").write_text(text)
  with pytest.raises(ConfigError, match=r"args\.json"):
    read_model_args(tmp_path / "args.json")


def test_the_written_config_is_one_that_train_takes(tmp_path, capsys):
  (tmp_path / "args.json").write_text(json.dumps(V3))
  arguments = ["checkpoint", "convert", f"--from_model_args={tmp_path}/args.json", f"--to={tmp_path}/config.json"]
  assert main(arguments) == 0
  assert "dtype='fp8'" in capsys.readouterr().out
  config, _ = read_model_args(tmp_path / "args.json")
  assert load_config(str(tmp_path / "config.json")) == config
  with pytest.raises(ConfigError, match="exists"):
    main(arguments)


def test_a_config_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
  def full(*arguments, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")

  (tmp_path / "args.json").write_text(json.dumps(V3))
  monkeypatch.setattr(os, "replace", full)
  with pytest.raises(CheckpointError, match="No space left on device; make room"):
    main(["checkpoint", "convert", f"--from_model_args={tmp_path}/args.json", f"--to={tmp_path}/config.json"])
  assert os.listdir(tmp_path) == ["args.json"]
