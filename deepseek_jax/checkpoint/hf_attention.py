"""The attention kinds in Hugging Face checkpoints: names of their tensors, and keys of config.json."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from deepseek_jax.checkpoint.hf_tensor import HFTensor, matrix_tensor, vector_tensor
from deepseek_jax.errors import CheckpointError
from deepseek_jax.model_config import ModelConfig

# Default values of the classes in transformers 5.
MLA_DEFAULTS = {
  "kv_lora_rank": 512,
  "q_lora_rank": 1536,
  "qk_nope_head_dim": 128,
  "qk_rope_head_dim": 64,
  "v_head_dim": 128,
}


@dataclasses.dataclass(frozen=True)
class HFAttention:
  """A row of HF_ATTENTION.

  Attributes:
    model_types: the values of `model_type` in config.json whose models have this attention.
    model_type: config -> the one of them that is nearest to the model.
    tensors: (config, prefix of names in the checkpoint, path of the attention's parameters, index of the layer there)
      -> its tensors.
    unsupported: (model_type, values of config.json, with defaults) -> what of them is not implemented here.
    from_hf: those values -> fields of AttentionConfig beside heads, RoPE and dropout.
    to_hf: (config, keys of the config.json that is written over) -> keys of config.json beside those.
  """

  model_types: tuple[str, ...]
  model_type: Callable[[ModelConfig], str]
  tensors: Callable[[ModelConfig, str, tuple[str, ...], tuple[int, ...]], list[HFTensor]]
  unsupported: Callable[[str, Mapping[str, Any]], list[str]]
  from_hf: Callable[[Mapping[str, Any]], dict[str, Any]]
  to_hf: Callable[[ModelConfig, Collection[str]], dict[str, Any]]


def _gqa_tensors(config: ModelConfig, name: str, path: tuple[str, ...], index: tuple[int, ...]) -> list[HFTensor]:
  """LlamaAttention, [heads * width, inputs] on disk."""
  a, embed = config.attention, (config.embed,)
  return [
    matrix_tensor(f"{name}.q_proj", (*path, "q"), embed, (a.heads, a.head_dim), index),
    matrix_tensor(f"{name}.k_proj", (*path, "k"), embed, (a.kv_heads, a.head_dim), index),
    matrix_tensor(f"{name}.v_proj", (*path, "v"), embed, (a.kv_heads, a.head_dim), index),
    matrix_tensor(f"{name}.o_proj", (*path, "o"), (a.heads, a.head_dim), embed, index),
  ]


def _mla_tensors(config: ModelConfig, name: str, path: tuple[str, ...], index: tuple[int, ...]) -> list[HFTensor]:
  """DeepseekV3Attention, [heads * width, inputs] on disk."""
  a, embed = config.attention, (config.embed,)
  query = (a.heads, a.qk_nope_head_dim + a.qk_rope_head_dim)
  if a.q_lora_rank:
    queries = [
      matrix_tensor(f"{name}.q_a_proj", (*path, "q_a"), embed, (a.q_lora_rank,), index),
      vector_tensor(f"{name}.q_a_layernorm.weight", (*path, "q_norm", "scale"), a.q_lora_rank, index),
      matrix_tensor(f"{name}.q_b_proj", (*path, "q_b"), (a.q_lora_rank,), query, index),
    ]
  else:
    queries = [matrix_tensor(f"{name}.q_proj", (*path, "q"), embed, query, index)]
  key_value = (a.heads, a.qk_nope_head_dim + a.v_head_dim)
  return queries + [
    matrix_tensor(f"{name}.kv_a_proj_with_mqa", (*path, "kv_a"), embed, (a.kv_lora_rank + a.qk_rope_head_dim,), index),
    vector_tensor(f"{name}.kv_a_layernorm.weight", (*path, "kv_norm", "scale"), a.kv_lora_rank, index),
    matrix_tensor(f"{name}.kv_b_proj", (*path, "kv_b"), (a.kv_lora_rank,), key_value, index),
    matrix_tensor(f"{name}.o_proj", (*path, "o"), (a.heads, a.v_head_dim), embed, index),
  ]


def _gqa_unsupported(model_type: str, values: Mapping[str, Any]) -> list[str]:
  width, heads = values["head_dim"], values["num_attention_heads"]
  if model_type == "deepseek" and width and width * heads != values["hidden_size"]:
    return [f"head_dim={width} (the code of {model_type} takes only hidden_size / num_attention_heads)"]
  if not width and values["hidden_size"] % heads:
    return [
      f"hidden_size={values['hidden_size']} without head_dim (it is not a multiple of num_attention_heads={heads})"
    ]
  return []


def _mla_unsupported(model_type: str, values: Mapping[str, Any]) -> list[str]:
  kv_heads, heads = values["num_key_value_heads"], values["num_attention_heads"]
  if kv_heads not in (None, heads):
    return [f"num_key_value_heads={kv_heads} (latent attention has as many as heads, {heads})"]
  return []


def _gqa_fields(values: Mapping[str, Any]) -> dict[str, Any]:
  heads = values["num_attention_heads"]
  head_dim = values["head_dim"] or values["hidden_size"] // heads
  return {"kv_heads": values["num_key_value_heads"] or heads, "head_dim": head_dim}


def _gqa_keys(config: ModelConfig, original: Collection[str]) -> dict[str, Any]:
  a = config.attention
  is_default = a.head_dim * a.heads == config.embed and "head_dim" not in original
  return {"num_key_value_heads": a.kv_heads} | ({} if is_default else {"head_dim": a.head_dim})


def _mla_keys(config: ModelConfig, original: Collection[str]) -> dict[str, Any]:
  a = config.attention
  widths = {key: getattr(a, key) for key in MLA_DEFAULTS}
  return widths | {"q_lora_rank": a.q_lora_rank or None, "num_key_value_heads": a.heads}


# A kind that no published format has needs no row: its models train, save and resume, and are not converted.
HF_ATTENTION = {
  "gqa": HFAttention(
    model_types=("llama", "deepseek"),
    model_type=lambda config: "deepseek" if config.moe.num_routed_experts else "llama",
    tensors=_gqa_tensors,
    unsupported=_gqa_unsupported,
    from_hf=_gqa_fields,
    to_hf=_gqa_keys,
  ),
  "mla": HFAttention(
    model_types=("deepseek_v2", "deepseek_v3"),
    model_type=lambda config: "deepseek_v3" if config.moe.score == "sigmoid" else "deepseek_v2",
    tensors=_mla_tensors,
    unsupported=_mla_unsupported,
    from_hf=lambda values: {key: values[key] for key in MLA_DEFAULTS} | {"q_lora_rank": values["q_lora_rank"] or 0},
    to_hf=_mla_keys,
  ),
}


def hf_attention(kind: str) -> HFAttention:
  """The row of an attention kind. Raises CheckpointError, naming it, where no Hugging Face format has it."""
  if kind not in HF_ATTENTION:
    raise CheckpointError(
      f"model.attention.kind={kind} has no Hugging Face format, only {', '.join(HF_ATTENTION)} have: keep the workdir, or "
      "add a row to HF_ATTENTION (checkpoint/hf_attention.py)"
    )
  return HF_ATTENTION[kind]


def attention_kind(model_type: str) -> str:
  """The attention kind of the models with this `model_type` of config.json, which is that of a row."""
  return next(kind for kind, row in HF_ATTENTION.items() if model_type in row.model_types)
