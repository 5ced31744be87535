"""DeepSeek's own ModelArgs JSON (the configs of their inference code) to a Config."""

import dataclasses
import json
import os
import pathlib
from typing import Any

from deepseek_jax.checkpoint.hf_files import replace_files
from deepseek_jax.config import Config
from deepseek_jax.config_sections import DataConfig
from deepseek_jax.data.tokenizer import NO_TOKENIZER
from deepseek_jax.errors import ConfigError
from deepseek_jax.model_config import AttentionConfig, ModelConfig, MoEConfig, YarnConfig

# Keys and defaults of ModelArgs in DeepSeek's inference/model.py; a file names what differs. The type is the default's.
DEFAULTS: dict[str, Any] = {
  "vocab_size": 102_400, "dim": 2048, "inter_dim": 10_944, "moe_inter_dim": 1408, "n_layers": 27, "n_dense_layers": 1,
  "n_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2, "n_activated_experts": 6, "n_expert_groups": 1,
  "n_limited_groups": 1, "score_func": "softmax", "route_scale": 1.0, "q_lora_rank": 0, "kv_lora_rank": 512,
  "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "original_seq_len": 4096, "rope_theta": 10_000.0,
  "rope_factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "max_seq_len": 16_384,
}  # fmt: skip
# How their program runs, not what the model is: these keys are checked for their type, and dropped.
INFERENCE_KEYS: dict[str, Any] = {"max_batch_size": 8, "dtype": "bf16", "gemm_impl": "bf16", "scale_fmt": None}
CHOICES = {
  "score_func": ("softmax", "sigmoid"), "dtype": ("bf16", "fp8"), "gemm_impl": ("bf16", "fp8"), "scale_fmt": (None, "ue8m0"),
}  # fmt: skip
ROUTER_BIAS_DIM = 7168  # V3's width: only for it, their Gate has a bias, and scores groups by their best two experts

TOKENIZERS = {102_400: "deepseek-llm", 129_280: "deepseek-v3"}  # by the rows of the embedding


def read_model_args(path: str | os.PathLike) -> tuple[Config, list[str]]:
  """(Config, notes) of a ModelArgs JSON: the model, data.seq = max_seq_len, and lines about dropped keys.

  Raises ConfigError that lists every unknown key and every value of another type.
  """
  path = pathlib.Path(path)
  try:
    raw = json.loads(path.read_bytes())
  except (OSError, ValueError, RecursionError) as error:
    raise ConfigError(f"cannot read {path} as JSON: {error}; --from_model_args takes DeepSeek's ModelArgs") from None
  if not isinstance(raw, dict):
    raise ConfigError(f"{path} must be a JSON object with the keys of ModelArgs, got {raw!r:.60}")
  known = DEFAULTS | INFERENCE_KEYS
  wrong = [f"{key}: unknown" for key in raw if key not in known]
  wrong += [
    f"{key} must be {_expected_type(key)}, got {value!r}"
    for key, value in raw.items()
    if key in known and not _has_expected_type(key, value)
  ]
  if wrong:
    raise ConfigError(f"{path} is not a ModelArgs: {'; '.join(wrong)}; the keys are {', '.join(known)}")
  args = DEFAULTS | raw
  if _yarn_is_on(args) and not args["mscale"]:
    raise ConfigError(f"{path}: mscale=0 with max_seq_len above original_seq_len is not supported: give it above 0")
  data = DataConfig(seq=args["max_seq_len"], tokenizer=TOKENIZERS.get(args["vocab_size"], NO_TOKENIZER))
  notes = [f"{key}={raw[key]!r} describes inference: dropped" for key in INFERENCE_KEYS if key in raw]
  notes.append(f"data.seq={data.seq} is max_seq_len; YaRN is {'on' if _yarn_is_on(args) else 'off'}")
  if data.tokenizer == NO_TOKENIZER:
    notes.append(
      f"data.tokenizer={NO_TOKENIZER}: none is known for vocab_size={args['vocab_size']}; train takes one by "
      "--config.data.tokenizer"
    )
  if args["score_func"] == "sigmoid" and args["dim"] != ROUTER_BIAS_DIM:
    notes.append(f"no router bias: DeepSeek's code has one only for dim={ROUTER_BIAS_DIM}")
  return Config(name=path.stem, model=_model_config(args), data=data), notes


def write_config(config: Config, path: str | os.PathLike) -> None:
  """Writes `config` as the JSON that `train --config` takes: its model section, name, sequence and tokenizer.

  Raises ConfigError where `path` exists, CheckpointError where the disk refuses.
  """
  path = pathlib.Path(path)
  if path.exists():
    raise ConfigError(f"--to={path} exists: give another name, or remove it")
  data = {"seq": config.data.seq, "tokenizer": config.data.tokenizer}
  tree = {"name": config.name, "model": dataclasses.asdict(config.model), "data": data}
  with replace_files(path.parent, [path.name]) as partial:
    partial[path.name].write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _model_config(args: dict[str, Any]) -> ModelConfig:
  dense_layers = min(args["n_dense_layers"], args["n_layers"])
  has_bias = args["dim"] == ROUTER_BIAS_DIM
  moe = MoEConfig(
    num_routed_experts=args["n_routed_experts"],
    num_shared_experts=args["n_shared_experts"],
    num_experts_per_token=args["n_activated_experts"],
    mlp=args["moe_inter_dim"],
    score=args["score_func"],
    num_expert_groups=args["n_expert_groups"],
    topk_groups=args["n_limited_groups"],
    group_score="top2_sum" if has_bias else "max",
    router_bias=has_bias,
    norm_topk_prob=args["score_func"] == "sigmoid",
    route_scale=args["route_scale"],
  )
  return ModelConfig(
    vocab=args["vocab_size"],
    embed=args["dim"],
    layers=args["n_layers"],
    first_dense_layers=dense_layers if args["n_routed_experts"] else 0,
    mlp=args["inter_dim"],
    attention=_attention_config(args),
    moe=moe,
  )


def _attention_config(args: dict[str, Any]) -> AttentionConfig:
  """Their softmax scale has the square of 0.1 mscale ln(rope_factor) + 1; their cos and sin are never scaled."""
  yarn = YarnConfig()
  if _yarn_is_on(args):
    yarn = YarnConfig(
      factor=args["rope_factor"],
      original_seq=args["original_seq_len"],
      beta_fast=args["beta_fast"],
      beta_slow=args["beta_slow"],
      mscale=args["mscale"],
      mscale_all_dim=args["mscale"],
    )
  widths = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
  return AttentionConfig(
    kind="mla",
    heads=args["n_heads"],
    rope_theta=args["rope_theta"],
    yarn=yarn,
    **{name: args[name] for name in widths},
  )


def _yarn_is_on(args: dict[str, Any]) -> bool:
  """Whether their code applies YaRN: only to models that run beyond the original context."""
  return args["max_seq_len"] > args["original_seq_len"]


def _is_float(key: str) -> bool:
  return type((DEFAULTS | INFERENCE_KEYS)[key]) is float


def _expected_type(key: str) -> str:
  if key in CHOICES:
    return f"one of {', '.join(map(repr, CHOICES[key]))}"
  return "a number" if _is_float(key) else "an integer"


def _has_expected_type(key: str, value: Any) -> bool:
  if key in CHOICES:
    return value in CHOICES[key]
  return type(value) is int or (_is_float(key) and type(value) is float)
