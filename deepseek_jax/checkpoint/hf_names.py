"""Which tensor of a Hugging Face checkpoint is which slice of a parameter: one table, used in both directions."""

from typing import Any

from deepseek_jax.checkpoint.hf_attention import hf_attention
from deepseek_jax.checkpoint.hf_tensor import HFTensor, matrix_tensor, vector_tensor
from deepseek_jax.model_config import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _swiglu_tensors(name: str, path: tuple[str, ...], embed: int, mlp: int, index: tuple[int, ...]) -> list[HFTensor]:
  """The three matrices of a SwiGLU (LlamaMLP): gate and up are [mlp, embed] in the checkpoint, down is [embed, mlp]."""
  return [
    matrix_tensor(f"{name}.gate_proj", (*path, "gate"), (embed,), (mlp,), index),
    matrix_tensor(f"{name}.up_proj", (*path, "up"), (embed,), (mlp,), index),
    matrix_tensor(f"{name}.down_proj", (*path, "down"), (mlp,), (embed,), index),
  ]


def _moe_tensors(config: ModelConfig, name: str, path: tuple[str, ...], index: tuple[int, ...]) -> list[HFTensor]:
  """Router [experts, embed], its bias [experts], each expert, and the shared experts as one SwiGLU (DeepseekV3MoE)."""
  moe, embed = config.moe, config.embed
  tensors = [matrix_tensor(f"{name}.gate", (*path, "router"), (embed,), (moe.num_routed_experts,), index)]
  if moe.router_bias:
    bias = f"{name}.gate.e_score_correction_bias"
    tensors.append(vector_tensor(bias, (*path, "router", "bias"), moe.num_routed_experts, index, buffer=True))
  for expert in range(moe.num_routed_experts):
    tensors += _swiglu_tensors(f"{name}.experts.{expert}", (*path, "experts"), embed, moe.mlp, (*index, expert))
  if moe.num_shared_experts:
    tensors += _swiglu_tensors(
      f"{name}.shared_experts", (*path, "shared"), embed, moe.num_shared_experts * moe.mlp, index
    )
  return tensors


def _block_tensors(
  config: ModelConfig, layer: int, path: tuple[str, ...], index: tuple[int, ...], is_moe: bool
) -> list[HFTensor]:
  """Every tensor of model.layers.`layer`; `path` and `index` are those of the block in our tree."""
  name = f"model.layers.{layer}"
  return [
    vector_tensor(f"{name}.input_layernorm.weight", (*path, "attn_norm", "scale"), config.embed, index),
    *hf_attention(config.attention.kind).tensors(config, f"{name}.self_attn", (*path, "attn"), index),
    vector_tensor(f"{name}.post_attention_layernorm.weight", (*path, "mlp_norm", "scale"), config.embed, index),
    *(
      _moe_tensors(config, f"{name}.mlp", (*path, "moe"), index)
      if is_moe
      else _swiglu_tensors(f"{name}.mlp", (*path, "mlp"), config.embed, config.mlp, index)
    ),
  ]


def _embedding_tensor(config: ModelConfig, name: str = EMBEDDING, **kwargs: Any) -> HFTensor:
  """[vocab, embed] on both sides."""
  shape = (config.vocab, config.embed)
  return HFTensor(name, ("embed",), (), shape, shape, **kwargs)


def _head_tensor(config: ModelConfig, name: str = "lm_head", **kwargs: Any) -> HFTensor:
  """[vocab, embed] in the checkpoint, [embed, vocab] in the parameter; the embedding where the two are tied."""
  if config.tied_embeddings:
    return _embedding_tensor(config, name + ".weight", **kwargs)
  return matrix_tensor(name, ("head",), (config.embed,), (config.vocab,), **kwargs)


def _mtp_tensors(config: ModelConfig, depth: int) -> list[HFTensor]:
  """Depth `depth` of multi-token prediction is one more layer, with copies of the main model's embedding and head."""
  layer, index, path = config.layers + depth, (depth,), ("mtp_layers",)
  name = f"model.layers.{layer}"
  return [
    _embedding_tensor(config, f"{name}.embed_tokens.weight", is_copy=True),
    vector_tensor(f"{name}.enorm.weight", (*path, "embed_norm", "scale"), config.embed, index),
    vector_tensor(f"{name}.hnorm.weight", (*path, "hidden_norm", "scale"), config.embed, index),
    matrix_tensor(f"{name}.eh_proj", (*path, "proj"), (2 * config.embed,), (config.embed,), index),
    *_block_tensors(config, layer, (*path, "block"), index, config.moe.num_routed_experts > 0),
    vector_tensor(f"{name}.shared_head.norm.weight", (*path, "norm", "scale"), config.embed, index),
    _head_tensor(config, f"{name}.shared_head.head", is_copy=True),
  ]


def hf_tensors(config: ModelConfig) -> list[HFTensor]:
  """Every tensor that a checkpoint of `config` has, in the order in which it is written."""
  tensors, dense = [_embedding_tensor(config)], config.num_dense_layers
  for layer in range(config.layers):
    is_moe = layer >= dense
    index = (layer - dense,) if is_moe else (layer,)
    tensors += _block_tensors(config, layer, ("moe_layers" if is_moe else "dense_layers",), index, is_moe)
  for depth in range(config.num_mtp_layers):
    tensors += _mtp_tensors(config, depth)
  tensors.append(vector_tensor("model.norm.weight", ("final_norm", "scale"), config.embed))
  return tensors if config.tied_embeddings else [*tensors, _head_tensor(config)]
