"""ModelConfig to the config.json of a Hugging Face checkpoint, with the keys of the published ones."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from deepseek_jax.checkpoint.hf_attention import hf_attention
from deepseek_jax.checkpoint.hf_files import CONFIG_FILE
from deepseek_jax.checkpoint.hf_model import to_model_config
from deepseek_jax.errors import CheckpointError
from deepseek_jax.model_config import ATTENTION_KINDS, ATTENTION_SHAPE_FIELDS, AttentionConfig, ModelConfig

ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "deepseek": "DeepseekForCausalLM",
  "deepseek_v2": "DeepseekV2ForCausalLM",
  "deepseek_v3": "DeepseekV3ForCausalLM",
}
# Fields that a config.json does not have, and that do not change what the model computes in inference.
NOT_IN_HF_CONFIG = {
  "param_dtype", "compute_dtype", "precision", "fp8", "remat", "dropout", "dispatch", "buffer_factor", "capacity_factor", "no_drop_fraction", "kv_comm",
  "implementation",
}  # fmt: skip


def hf_model_type(config: ModelConfig) -> str:
  """The `model_type` of the Hugging Face model that is nearest to `config`. Raises CheckpointError where there is none."""
  if config.moe.num_routed_experts and config.moe.router != "topk":
    raise CheckpointError(
      f"model.moe.router={config.moe.router} has no Hugging Face format, only topk has: keep the workdir, from which runs "
      "resume and start"
    )
  return hf_attention(config.attention.kind).model_type(config)


def to_hf_config(config: ModelConfig, dtype: str, original: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """The content of a config.json for `config`.

  Args:
    dtype: of the tensors. original: a config.json whose other keys are copied.

  Raises CheckpointError when no Hugging Face model computes what `config` does, naming the fields.
  """
  kind, a, moe, yarn = hf_model_type(config), config.attention, config.moe, config.attention.yarn
  dropped = ("quantization_config", "rope_parameters", "dtype", "original_max_position_embeddings")
  raw = {key: value for key, value in (original or {}).items() if key not in dropped}
  raw.setdefault("max_position_embeddings", int(yarn.original_seq * yarn.factor))
  scaling = {
    "type": "yarn",
    "factor": yarn.factor,
    "original_max_position_embeddings": yarn.original_seq,
    "beta_fast": yarn.beta_fast,
    "beta_slow": yarn.beta_slow,
    **{key: getattr(yarn, key) for key in ("mscale", "mscale_all_dim") if getattr(yarn, key)},
  }
  raw |= {
    "architectures": [ARCHITECTURES[kind]],
    "model_type": kind,
    "torch_dtype": dtype,
    "vocab_size": config.vocab,
    "hidden_size": config.embed,
    "intermediate_size": config.mlp,
    "num_hidden_layers": config.layers,
    "num_attention_heads": a.heads,
    "hidden_act": "silu",
    "rms_norm_eps": config.norm_eps,
    "initializer_range": config.init_std,
    "tie_word_embeddings": config.tied_embeddings,
    "rope_theta": a.rope_theta,
    "rope_scaling": scaling if yarn.factor != 1 else None,
    "attention_bias": False,
    "attention_dropout": a.dropout,
  }
  raw |= hf_attention(a.kind).to_hf(config, raw)
  raw |= _moe_keys(config, kind) if moe.num_routed_experts else {}
  _check_round_trip(config, raw)
  return raw


def _moe_keys(config: ModelConfig, kind: str) -> dict[str, Any]:
  """The keys of the experts that the published config.json of `kind` has."""
  moe = config.moe
  raw: dict[str, Any] = {
    "n_routed_experts": moe.num_routed_experts,
    "n_shared_experts": moe.num_shared_experts,
    "num_experts_per_tok": moe.num_experts_per_token,
    "moe_intermediate_size": moe.mlp,
    "first_k_dense_replace": config.first_dense_layers,
    "moe_layer_freq": 1,
    # No code of V2 computes what it does here; `_check_round_trip` names the field then.
    "norm_topk_prob": moe.norm_topk_prob and kind != "deepseek_v2",
    "scoring_func": moe.score,
  }
  if kind == "deepseek":
    return raw
  v2_method = "group_limited_greedy" if moe.num_expert_groups > 1 else "greedy"
  raw |= {
    "topk_method": v2_method if kind == "deepseek_v2" else "noaux_tc",
    "n_group": moe.num_expert_groups,
    "topk_group": moe.topk_groups,
    "routed_scaling_factor": moe.route_scale,
  }
  return raw | ({"num_nextn_predict_layers": config.num_mtp_layers} if kind == "deepseek_v3" else {})


def _check_round_trip(config: ModelConfig, raw: Mapping[str, Any]) -> None:
  """Converts `raw` back. Raises CheckpointError with the fields that are not the same."""
  names = [f"model.layers.{config.layers + depth}.enorm.weight" for depth in range(config.num_mtp_layers)]
  unsupported = f"no Hugging Face model of type {raw['model_type']} computes this one"
  advice = "train with the settings of a released model to export it"
  try:
    converted = to_model_config(raw, names, CONFIG_FILE)
  except CheckpointError as error:
    raise CheckpointError(f"{unsupported}: {error}; {advice}") from None
  changed = sorted(_changed_fields(config, converted))
  if changed:
    raise CheckpointError(f"{unsupported}: {', '.join(changed)} cannot be expressed in its config.json; {advice}")


def _changed_fields(before: Any, after: Any) -> Iterator[str]:
  """Fields of two config sections that differ, as `path=value before`; only fields that have an effect in inference."""
  ignored = set(NOT_IN_HF_CONFIG)
  if getattr(before, "num_expert_groups", 0) == 1:
    ignored.add("group_score")
  if isinstance(before, AttentionConfig):
    ignored |= ATTENTION_SHAPE_FIELDS - set(ATTENTION_KINDS[before.kind].shape_fields)
  if getattr(before, "factor", 0) == 1:  # YaRN is off
    return
  for field in dataclasses.fields(before):
    if field.name in ignored:
      continue
    old, new = getattr(before, field.name), getattr(after, field.name)
    if dataclasses.is_dataclass(old):
      yield from _changed_fields(old, new)
    elif old != new:
      yield f"{before.path}.{field.name}={old}"
