"""config.json of Hugging Face checkpoints, as published and as transformers 5 writes it, to our ModelConfig."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from deepseek_jax.checkpoint.hf_attention import MLA_DEFAULTS, attention_kind, hf_attention
from deepseek_jax.checkpoint.hf_files import CONFIG_FILE, FP8_BLOCK, HFReader
from deepseek_jax.errors import CheckpointError, ConfigError
from deepseek_jax.model_config import AttentionConfig, ModelConfig, MoEConfig, YarnConfig

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
    "topk_method": "greedy", "routed_scaling_factor": 1.0, "scoring_func": "softmax",
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
  except (OSError, ValueError) as error:
    raise CheckpointError(f"{path} cannot be read: {error}; a Hugging Face checkpoint has one") from None
  if not isinstance(raw, dict):
    raise CheckpointError(f"{path} holds {type(raw).__name__} where an object is expected")
  return raw


def read_model_config(directory: str | os.PathLike) -> ModelConfig:
  """The model of a Hugging Face folder.

  Raises CheckpointError for what is not implemented here, naming key and value.
  """
  raw = read_config_json(directory)
  return to_model_config(raw, HFReader(directory).names, pathlib.Path(directory) / CONFIG_FILE)


def to_model_config(raw: Mapping[str, Any], names: Iterable[str], source: str | os.PathLike) -> ModelConfig:
  """The ModelConfig of a config.json.

  Args: `raw`: its content. `names`: the tensors of the checkpoint. `source`: what to call the file in errors.

  The depth of multi-token prediction follows from the tensors: transformers writes num_nextn_predict_layers = 1 by
  default. Raises CheckpointError for what is not implemented here, naming key and value.
  """
  kind = raw.get("model_type")
  if kind not in list(DEFAULTS):  # it need not be hashable
    raise CheckpointError(f"{source}: model_type={kind!r} is not supported; {', '.join(DEFAULTS)} are")
  values = DEFAULTS[kind] | dict(raw)
  try:
    check_supported(kind, values, source)
    depth = mtp_depth(names, values["num_hidden_layers"]) if kind == "deepseek_v3" else 0
    moe = moe_config(kind, values) if values.get("n_routed_experts") else MoEConfig()
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
  except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
    raise CheckpointError(f"{source}: a value is not of the type that its key has ({error})") from None


def check_supported(kind: str, values: Mapping[str, Any], source: str | os.PathLike) -> None:
  """Raises one CheckpointError that lists every key whose value is not implemented."""
  wrong = [
    f"{key}={values[key]!r} (only {supported[0]!r} is)"
    for key, supported in SUPPORTED_VALUES.items()
    if values[key] not in supported
  ]
  if values.get("scoring_func", SCORING_FUNCS.get(kind)) != SCORING_FUNCS.get(kind):
    wrong.append(f"scoring_func={values['scoring_func']!r} (of {kind} only {SCORING_FUNCS.get(kind)!r} is)")
  if kind in TOPK_METHODS and (values.get("topk_method") or TOPK_METHODS[kind][0]) not in TOPK_METHODS[kind]:
    wrong.append(f"topk_method={values['topk_method']!r} (of {kind} only {' and '.join(TOPK_METHODS[kind])} is)")
  quantization = values.get("quantization_config") or {}
  block = quantization.get("weight_block_size", [FP8_BLOCK, FP8_BLOCK])
  if quantization and (quantization.get("quant_method") != "fp8" or block != [FP8_BLOCK, FP8_BLOCK]):
    wrong.append(
      f"quantization_config={quantization} (only fp8 with a weight_block_size of [{FP8_BLOCK}, {FP8_BLOCK}] is)"
    )
  wrong += hf_attention(attention_kind(kind)).unsupported(kind, values)
  if wrong:
    raise CheckpointError(f"{source} has values that are not supported: {'; '.join(wrong)}")


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


def rope_config(values: Mapping[str, Any], source: str | os.PathLike) -> tuple[float, YarnConfig]:
  """(theta, YaRN).

  Published: rope_theta and rope_scaling {type}; transformers 5: rope_parameters {rope_type, rope_theta}.
  """
  scaling = values.get("rope_scaling") or values.get("rope_parameters") or {}
  theta = scaling.get("rope_theta") or values.get("rope_theta") or 10_000.0
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  partial = scaling.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1
  if partial != 1 or kind not in ("default", "yarn"):
    raise CheckpointError(
      f"{source}: rotary embeddings of type {kind!r} with partial_rotary_factor={partial} are not supported; "
      "default and yarn are, over the full head width"
    )
  if kind == "default":
    return theta, YarnConfig()
  refused = {
    key: scaling[key] for key in ("attention_factor", "truncate") if scaling.get(key) not in (None, key == "truncate")
  }
  if refused or not scaling.get("factor"):
    raise CheckpointError(
      f"{source}: YaRN needs a factor and takes no {refused or 'other way to give it'}: attention_factor follows from "
      "mscale and mscale_all_dim, and the ends of the ramp are integers (truncate)"
    )
  original = values.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
  return theta, YarnConfig(
    factor=scaling["factor"],
    original_seq=original or values["max_position_embeddings"],
    beta_fast=scaling.get("beta_fast") or 32.0,
    beta_slow=scaling.get("beta_slow") or 1.0,
    mscale=scaling.get("mscale") or 0.0,
    mscale_all_dim=scaling.get("mscale_all_dim") or 0.0,
  )


def moe_config(kind: str, values: Mapping[str, Any]) -> MoEConfig:
  """The MoE section.

  Only the keys that transformers reads for this kind of model count: its function is the reference.
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
    # transformers ignores V2's norm_topk_prob and always multiplies by routed_scaling_factor; DeepSeek's own code
    # multiplies only where it does not normalize. All released V2 models have norm_topk_prob false.
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
