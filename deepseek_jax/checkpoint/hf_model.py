"""config.json of Hugging Face checkpoints, as published and as transformers 5 writes it, to our ModelConfig."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from deepseek_jax.checkpoint.hf_attention import MLA_DEFAULTS, attention_kind, hf_attention
from deepseek_jax.checkpoint.hf_files import CONFIG_FILE, FP8_BLOCK, HFReader
from deepseek_jax.checkpoint.hf_keys import EXPERTS, MLA, type_errors, unknown_keys
from deepseek_jax.checkpoint.hf_names import EMBEDDING, HEAD
from deepseek_jax.checkpoint.hf_rope import rope_config
from deepseek_jax.console import current_console
from deepseek_jax.errors import CheckpointError, ConfigError
from deepseek_jax.model_config import AttentionConfig, ModelConfig, MoEConfig

# What a config.json that leaves a key out means: the defaults of the classes in transformers 5, and for `deepseek`
# (MoE-16B) those of the code that DeepSeek published with it.
_COMMON = {
  "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
  "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "moe_layer_freq": 1, "rope_interleave": True,
  "num_key_value_heads": None, "head_dim": None,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
  "llama": _COMMON | {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048,
  },
  "deepseek": _COMMON | {
    "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "moe_intermediate_size": 1407,
    "num_hidden_layers": 30, "num_attention_heads": 32, "max_position_embeddings": 2048, "n_shared_experts": None,
    "n_routed_experts": None, "num_experts_per_tok": None, "first_k_dense_replace": 0, "norm_topk_prob": False,
    "scoring_func": "softmax",
  },
  "deepseek_v2": _COMMON | MLA_DEFAULTS | {
    "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "moe_intermediate_size": 1407,
    "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048, "n_shared_experts": 2,
    "n_routed_experts": 64, "num_experts_per_tok": None, "first_k_dense_replace": 0, "n_group": None, "topk_group": None,
    "topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 1.0, "scoring_func": "softmax",
  },
  "deepseek_v3": _COMMON | MLA_DEFAULTS | {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_attention_heads": 128, "max_position_embeddings": 4096, "n_shared_experts": 1,
    "n_routed_experts": 256, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4,
    "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
  },
}  # fmt: skip
# Keys of which only these values are implemented here.
SUPPORTED_VALUES = {
  "hidden_act": ("silu",),
  "attention_bias": (False,),
  "mlp_bias": (False,),
  "moe_layer_freq": (1,),
  "rope_interleave": (True,),
}
# Keys of the base class of transformers that change the function, and are not implemented here.
NOT_IMPLEMENTED = (
  "per_layer_config", "is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder", "pruned_heads",
)  # fmt: skip
MTP_MODULES = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
SCORING_FUNCS = {"deepseek": "softmax", "deepseek_v2": "softmax", "deepseek_v3": "sigmoid"}
TOPK_METHODS = {
  "deepseek": ("greedy",),
  "deepseek_v2": ("greedy", "group_limited_greedy"),
  "deepseek_v3": ("noaux_tc",),
}


def read_config_json(directory: str | os.PathLike) -> dict[str, Any]:
  """The content of config.json of `directory`. Raises CheckpointError where it is missing or not a JSON object."""
  path = pathlib.Path(directory) / CONFIG_FILE
  try:
    raw = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise CheckpointError(f"{path} cannot be read: {error}; a Hugging Face checkpoint has one") from None
  if not isinstance(raw, dict):
    raise CheckpointError(f"{path} holds {type(raw).__name__} where an object is expected")
  return raw


def read_model_config(directory: str | os.PathLike) -> ModelConfig:
  """The model of a Hugging Face folder. Prints a note for each thing in config.json that is not taken as it stands.

  Raises CheckpointError for what is not implemented here, naming key and value.
  """
  raw, reader, source = read_config_json(directory), HFReader(directory), pathlib.Path(directory) / CONFIG_FILE
  notes = []
  # As transformers 5 does: the key says tied, and the files say that the two were trained apart.
  if raw.get("tie_word_embeddings") is True and {EMBEDDING, HEAD} <= set(reader.names):
    if not reader.are_equal(HEAD, EMBEDDING):
      raw["tie_word_embeddings"] = False
      notes.append(f"tie_word_embeddings=true is not followed: {HEAD} is in the files and differs from {EMBEDDING}")
  config = to_model_config(raw, reader.names, source)
  if raw.get("num_nextn_predict_layers") and not config.num_mtp_layers:
    notes.append("num_nextn_predict_layers=1 (transformers' default) is not followed: the files hold no such layer")
  if unknown := unknown_keys(raw, raw["model_type"]):
    notes.append(f"keys that no model of type {raw['model_type']} reads, and that are not used: {', '.join(unknown)}")
  for note in notes:
    current_console().print(f"note     {source}: {note}")
  return config


def to_model_config(raw: Mapping[str, Any], names: Iterable[str], source: str | os.PathLike) -> ModelConfig:
  """The ModelConfig of a config.json.

  Args: `raw`: its content. `names`: the tensors of the checkpoint. `source`: what to call the file in errors.

  The depth of multi-token prediction follows from the tensors. Raises CheckpointError for what is not implemented here,
  and for values of another type than their key has (`hf_keys`), naming keys and values.
  """
  kind = raw.get("model_type")
  if kind not in list(DEFAULTS):  # it need not be hashable
    raise CheckpointError(f"{source}: model_type={kind!r} is not supported; {', '.join(DEFAULTS)} are")
  if wrong := type_errors(raw, kind):
    raise CheckpointError(f"{source}: a value is not of the type that its key has: {'; '.join(wrong)}; correct it")
  values = DEFAULTS[kind] | dict(raw)
  depth = mtp_depth(names, values["num_hidden_layers"]) if kind == "deepseek_v3" else 0
  check_supported(kind, values, depth, source)
  try:
    moe = moe_config(kind, values) if kind in EXPERTS and values["n_routed_experts"] else MoEConfig()
    return ModelConfig(
      vocab=values["vocab_size"],
      embed=values["hidden_size"],
      layers=values["num_hidden_layers"],
      first_dense_layers=min(values["first_k_dense_replace"], values["num_hidden_layers"])
      if moe.num_routed_experts
      else 0,
      num_mtp_layers=depth,
      mlp=values["intermediate_size"],
      norm_eps=values["rms_norm_eps"],
      init_std=values["initializer_range"],
      tied_embeddings=values["tie_word_embeddings"],
      attention=attention_config(kind, values, source),
      moe=moe,
    )
  except ConfigError as error:
    raise CheckpointError(f"{source}: {error}") from None


def check_supported(kind: str, values: Mapping[str, Any], depth: int, source: str | os.PathLike) -> None:
  """Raises one CheckpointError that lists every key whose value is not implemented, or not what the files hold.

  Args: `kind`: model_type. `values`: with defaults. `depth`: of multi-token prediction, in the files.
  """
  wrong = [
    f"{key}={values[key]!r} (only {supported[0]!r} is)"
    for key, supported in SUPPORTED_VALUES.items()
    if values[key] not in supported
  ]
  if kind in SCORING_FUNCS and values.get("scoring_func", SCORING_FUNCS[kind]) != SCORING_FUNCS[kind]:
    wrong.append(f"scoring_func={values['scoring_func']!r} (of {kind} only {SCORING_FUNCS[kind]!r} is)")
  if kind in TOPK_METHODS and (values.get("topk_method") or TOPK_METHODS[kind][0]) not in TOPK_METHODS[kind]:
    wrong.append(f"topk_method={values['topk_method']!r} (of {kind} only {' and '.join(TOPK_METHODS[kind])} is)")
  wrong += _contradictions(kind, values, depth)
  wrong += [f"{key}={values[key]!r:.60} (only false, null or empty is)" for key in NOT_IMPLEMENTED if values.get(key)]
  quantization = values.get("quantization_config") or {}
  block = quantization.get("weight_block_size", [FP8_BLOCK, FP8_BLOCK])
  is_fp8 = quantization.get("quant_method") == "fp8" and quantization.get("fmt", "e4m3") == "e4m3"
  if quantization and (not is_fp8 or block != [FP8_BLOCK, FP8_BLOCK]):
    wrong.append(
      f"quantization_config={quantization} (only fp8 in e4m3 with a weight_block_size of [{FP8_BLOCK}, {FP8_BLOCK}] is)"
    )
  wrong += hf_attention(attention_kind(kind)).unsupported(kind, values)
  if wrong:
    raise CheckpointError(f"{source} has values that are not supported: {'; '.join(wrong)}")


def _contradictions(kind: str, values: Mapping[str, Any], depth: int) -> list[str]:
  """Keys that say something else than another key, than the files (`depth`), or than another code that reads them."""
  wrong = []
  claimed = values.get("num_nextn_predict_layers")
  # transformers writes 1 into the config.json of every V3, with such a layer or without.
  if kind == "deepseek_v3" and claimed not in (None, depth) and (claimed, depth) != (1, 0):
    layers = values["num_hidden_layers"]
    wrong.append(f"num_nextn_predict_layers={claimed} (the files hold {depth} of them, from model.layers.{layers} on)")
  if kind in EXPERTS:
    experts = values["n_routed_experts"] or 0
    wrong += [
      f"{key}={values[key]} (in transformers another name of n_routed_experts, which is {experts})"
      for key in ("num_local_experts", "num_experts")
      if values.get(key) not in (None, experts)
    ]
  if kind == "deepseek_v2" and values["norm_topk_prob"] and (values["num_experts_per_tok"] or 0) > 1:
    wrong.append(
      "norm_topk_prob=True (transformers does not read it in deepseek_v2, and DeepSeek's code divides by the sum and then "
      "leaves routed_scaling_factor out: set it to false, as in every release, if the model was trained so)"
    )
  width = values.get("qk_head_dim")
  if kind in MLA and width not in (None, values["qk_nope_head_dim"] + values["qk_rope_head_dim"]):
    wrong.append(f"qk_head_dim={width} (it is the sum of qk_nope_head_dim and qk_rope_head_dim)")
  return wrong


def mtp_depth(names: Iterable[str], layers: int) -> int:
  """Number of consecutive layers after the first `layers` that have a module of multi-token prediction."""
  names, depth = set(names), 0
  while any(f"model.layers.{layers + depth}.{module}.weight" in names for module in MTP_MODULES):
    depth += 1
  return depth


def attention_config(kind: str, values: Mapping[str, Any], source: str | os.PathLike) -> AttentionConfig:
  """Attention as the classes of transformers build it from `values`."""
  theta, yarn = rope_config(values, source)
  heads = values["num_attention_heads"]
  common: dict[str, Any] = dict(heads=heads, rope_theta=theta, yarn=yarn, dropout=values["attention_dropout"] or 0.0)
  attention = attention_kind(kind)
  return AttentionConfig(kind=attention, **common, **hf_attention(attention).from_hf(values))


def moe_config(kind: str, values: Mapping[str, Any]) -> MoEConfig:
  """The MoE section.

  transformers' function is the reference. Where DeepSeek's own code differs from it, `check_supported` has refused.
  """
  common: dict[str, Any] = dict(
    num_routed_experts=values["n_routed_experts"],
    num_shared_experts=values["n_shared_experts"] or 0,
    num_experts_per_token=values["num_experts_per_tok"] or 0,
    mlp=values["moe_intermediate_size"],
    score=SCORING_FUNCS[kind],
  )
  if kind == "deepseek":
    # DeepSeek's code does not normalize the weight of a single expert: that would make it 1.
    norm = bool(values["norm_topk_prob"]) and common["num_experts_per_token"] > 1
    return MoEConfig(norm_topk_prob=norm, **common)
  scale, groups, topk_groups = values["routed_scaling_factor"], values["n_group"] or 1, values["topk_group"] or 1
  if kind == "deepseek_v2":
    if values["topk_method"] != "group_limited_greedy":
      groups = topk_groups = 1
    return MoEConfig(num_expert_groups=groups, topk_groups=topk_groups, route_scale=scale, **common)
  return MoEConfig(
    num_expert_groups=groups,
    topk_groups=topk_groups,
    group_score="top2_sum",
    router_bias=True,
    # DeepSeek's inference code normalizes whenever the scores are sigmoids; transformers does as this says.
    norm_topk_prob=bool(values["norm_topk_prob"]),
    route_scale=scale,
    **common,
  )
