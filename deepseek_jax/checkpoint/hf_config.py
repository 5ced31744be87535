"""Our ModelConfig to the config.json of a Hugging Face checkpoint, in the published layout."""

import dataclasses

from deepseek_jax.checkpoint.hf_files import CONFIG
from deepseek_jax.checkpoint.hf_model import MLA, to_model_config
from deepseek_jax.errors import CheckpointError
from deepseek_jax.model_config import ModelConfig

ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "deepseek": "DeepseekForCausalLM",
  "deepseek_v2": "DeepseekV2ForCausalLM",
  "deepseek_v3": "DeepseekV3ForCausalLM",
}
# Settings of ours that a config.json does not have, and that do not change the function in inference.
OURS_ALONE = {
  "param_dtype", "compute_dtype", "precision", "fp8", "remat", "dropout", "dispatch", "buffer_factor", "capacity_factor", "no_drop_fraction", "kv_comm",
  "implementation",
}  # fmt: skip


def model_type(config: ModelConfig) -> str:
  """The kind of Hugging Face model that `config` is nearest to."""
  if config.attention.kind == "gqa":
    return "deepseek" if config.moe.num_routed_experts else "llama"
  return "deepseek_v3" if config.moe.score == "sigmoid" else "deepseek_v2"


def to_json(config: ModelConfig, dtype, original=None) -> dict:
  """The published layout of `config`, on top of the `original` config.json where there is one.

  Raises CheckpointError when no Hugging Face model computes what `config` does, naming the fields.
  """
  kind, a, moe, yarn = model_type(config), config.attention, config.moe, config.attention.yarn
  replaced = ("quantization_config", "rope_parameters", "dtype", "original_max_position_embeddings")
  raw = {key: value for key, value in (original or {}).items() if key not in replaced}
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
    "num_key_value_heads": a.kv_heads if a.kind == "gqa" else a.heads,
    "hidden_act": "silu",
    "rms_norm_eps": config.norm_eps,
    "initializer_range": config.init_std,
    "tie_word_embeddings": config.tied_embeddings,
    "rope_theta": a.rope_theta,
    "rope_scaling": scaling if yarn.factor != 1 else None,
    "attention_bias": False,
    "attention_dropout": a.dropout,
  }
  if a.kind == "mla":
    raw |= {key: getattr(a, key) for key in MLA} | {"q_lora_rank": a.q_lora_rank or None}
  elif a.head_dim * a.heads != config.embed or "head_dim" in raw:
    raw["head_dim"] = a.head_dim
  raw |= experts_json(config, kind) if moe.num_routed_experts else {}
  refuse_changed(config, raw)
  return raw


def experts_json(config: ModelConfig, kind) -> dict:
  """The keys of the experts, of those that the published config.json of `kind` has."""
  moe = config.moe
  raw = {
    "n_routed_experts": moe.num_routed_experts,
    "n_shared_experts": moe.num_shared_experts,
    "num_experts_per_tok": moe.num_experts_per_token,
    "moe_intermediate_size": moe.mlp,
    "first_k_dense_replace": config.first_dense_layers,
    "moe_layer_freq": 1,
    "norm_topk_prob": moe.norm_topk_prob,
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


def refuse_changed(config: ModelConfig, raw):
  """Reads `raw` as anyone would and compares: a model that comes back as another one is not written."""
  names = [f"model.layers.{config.layers + depth}.enorm.weight" for depth in range(config.num_mtp_layers)]
  lost = sorted(differences(config, to_model_config(raw, names, CONFIG)))
  if lost:
    raise CheckpointError(
      f"no Hugging Face model of type {raw['model_type']} computes this one: {', '.join(lost)} cannot be said in its "
      "config.json; train with the settings of a released model to export it"
    )


def differences(a, b):
  """Fields in which two configs differ, of those that a config.json has, as `path=value of a`."""
  inert = OURS_ALONE | ({"group_score"} if getattr(a, "num_expert_groups", 0) == 1 else set())
  if getattr(a, "kind", None) == "mla":
    inert |= {"kv_heads", "head_dim"}
  if getattr(a, "factor", 0) == 1:
    return
  for field in (f for f in dataclasses.fields(a) if f.name not in inert):
    x, y = getattr(a, field.name), getattr(b, field.name)
    if dataclasses.is_dataclass(x):
      yield from differences(x, y)
    elif x != y:
      yield f"{a.path}.{field.name}={x}"
