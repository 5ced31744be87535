"""Which tensor of a Hugging Face checkpoint is which slice of a parameter: one table, used in both directions."""

import dataclasses
import math
from typing import Any

import numpy as np

from deepseek_jax.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class HFTensor:
  """One tensor of a Hugging Face checkpoint.

  Attributes:
    name: in the checkpoint.
    path: keys of the parameter (or buffer) in our tree. index: in its leading dimensions (layer, expert), where the
      tensor belongs.
    shape: of the tensor. param_shape: of its slice of the parameter.
    transposed: the tensor is [out, in], and the parameter has its input dimensions before its output dimensions.
    buffer: `path` is in the buffers.
    is_copy: a second name of a parameter that another tensor has, too; it is written, and not read.
  """

  name: str
  path: tuple[str, ...]
  index: tuple[int, ...]
  shape: tuple[int, ...]
  param_shape: tuple[int, ...]
  transposed: bool = False
  buffer: bool = False
  is_copy: bool = False

  def to_param(self, tensor: np.ndarray) -> np.ndarray:
    """[shape] of the checkpoint -> [param_shape]."""
    return tensor.T.reshape(self.param_shape) if self.transposed else tensor

  def to_hf(self, param: np.ndarray) -> np.ndarray:
    """[param_shape] -> [shape] of the checkpoint."""
    return param.reshape(self.shape[::-1]).T if self.transposed else param


def _matrix_tensor(
  name: str,
  path: tuple[str, ...],
  inputs: tuple[int, ...],
  outputs: tuple[int, ...],
  index: tuple[int, ...] = (),
  **kwargs: Any,
) -> HFTensor:
  """A linear map; in the parameter inputs and outputs may have several dimensions: [embed] to [heads, head_dim]."""
  shape = (math.prod(outputs), math.prod(inputs))
  return HFTensor(name + ".weight", (*path, "kernel"), index, shape, (*inputs, *outputs), transposed=True, **kwargs)


def _vector_tensor(
  name: str, path: tuple[str, ...], width: int, index: tuple[int, ...] = (), **kwargs: Any
) -> HFTensor:
  """A tensor of one dimension, the same on both sides."""
  return HFTensor(name, path, index, (width,), (width,), **kwargs)


def _swiglu_tensors(name: str, path: tuple[str, ...], embed: int, mlp: int, index: tuple[int, ...]) -> list[HFTensor]:
  """The three matrices of a SwiGLU (LlamaMLP): gate and up are [mlp, embed] in the checkpoint, down is [embed, mlp]."""
  return [
    _matrix_tensor(f"{name}.gate_proj", (*path, "gate"), (embed,), (mlp,), index),
    _matrix_tensor(f"{name}.up_proj", (*path, "up"), (embed,), (mlp,), index),
    _matrix_tensor(f"{name}.down_proj", (*path, "down"), (mlp,), (embed,), index),
  ]


def _attention_tensors(config: ModelConfig, name: str, path: tuple[str, ...], index: tuple[int, ...]) -> list[HFTensor]:
  """Grouped-query (LlamaAttention) or latent attention (DeepseekV3Attention), [heads * width, inputs] on disk."""
  a, embed = config.attention, (config.embed,)
  if a.kind == "gqa":
    return [
      _matrix_tensor(f"{name}.q_proj", (*path, "q"), embed, (a.heads, a.head_dim), index),
      _matrix_tensor(f"{name}.k_proj", (*path, "k"), embed, (a.kv_heads, a.head_dim), index),
      _matrix_tensor(f"{name}.v_proj", (*path, "v"), embed, (a.kv_heads, a.head_dim), index),
      _matrix_tensor(f"{name}.o_proj", (*path, "o"), (a.heads, a.head_dim), embed, index),
    ]
  query = (a.heads, a.qk_nope_head_dim + a.qk_rope_head_dim)
  if a.q_lora_rank:
    queries = [
      _matrix_tensor(f"{name}.q_a_proj", (*path, "q_a"), embed, (a.q_lora_rank,), index),
      _vector_tensor(f"{name}.q_a_layernorm.weight", (*path, "q_norm", "scale"), a.q_lora_rank, index),
      _matrix_tensor(f"{name}.q_b_proj", (*path, "q_b"), (a.q_lora_rank,), query, index),
    ]
  else:
    queries = [_matrix_tensor(f"{name}.q_proj", (*path, "q"), embed, query, index)]
  key_value = (a.heads, a.qk_nope_head_dim + a.v_head_dim)
  return queries + [
    _matrix_tensor(f"{name}.kv_a_proj_with_mqa", (*path, "kv_a"), embed, (a.kv_lora_rank + a.qk_rope_head_dim,), index),
    _vector_tensor(f"{name}.kv_a_layernorm.weight", (*path, "kv_norm", "scale"), a.kv_lora_rank, index),
    _matrix_tensor(f"{name}.kv_b_proj", (*path, "kv_b"), (a.kv_lora_rank,), key_value, index),
    _matrix_tensor(f"{name}.o_proj", (*path, "o"), (a.heads, a.v_head_dim), embed, index),
  ]


def _moe_tensors(config: ModelConfig, name: str, path: tuple[str, ...], index: tuple[int, ...]) -> list[HFTensor]:
  """Router [experts, embed], its bias [experts], each expert, and the shared experts as one SwiGLU (DeepseekV3MoE)."""
  moe, embed = config.moe, config.embed
  tensors = [_matrix_tensor(f"{name}.gate", (*path, "router"), (embed,), (moe.num_routed_experts,), index)]
  if moe.router_bias:
    bias = f"{name}.gate.e_score_correction_bias"
    tensors.append(_vector_tensor(bias, (*path, "router", "bias"), moe.num_routed_experts, index, buffer=True))
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
    _vector_tensor(f"{name}.input_layernorm.weight", (*path, "attn_norm", "scale"), config.embed, index),
    *_attention_tensors(config, f"{name}.self_attn", (*path, "attn"), index),
    _vector_tensor(f"{name}.post_attention_layernorm.weight", (*path, "mlp_norm", "scale"), config.embed, index),
    *(
      _moe_tensors(config, f"{name}.mlp", (*path, "moe"), index)
      if is_moe
      else _swiglu_tensors(f"{name}.mlp", (*path, "mlp"), config.embed, config.mlp, index)
    ),
  ]


def _embedding_tensor(config: ModelConfig, name: str = "model.embed_tokens.weight", **kwargs: Any) -> HFTensor:
  """[vocab, embed] on both sides."""
  shape = (config.vocab, config.embed)
  return HFTensor(name, ("embed",), (), shape, shape, **kwargs)


def _head_tensor(config: ModelConfig, name: str = "lm_head", **kwargs: Any) -> HFTensor:
  """[vocab, embed] in the checkpoint, [embed, vocab] in the parameter; the embedding where the two are tied."""
  if config.tied_embeddings:
    return _embedding_tensor(config, name + ".weight", **kwargs)
  return _matrix_tensor(name, ("head",), (config.embed,), (config.vocab,), **kwargs)


def _mtp_tensors(config: ModelConfig, depth: int) -> list[HFTensor]:
  """Depth `depth` of multi-token prediction is one more layer, with copies of the main model's embedding and head."""
  layer, index, path = config.layers + depth, (depth,), ("mtp_layers",)
  name = f"model.layers.{layer}"
  return [
    _embedding_tensor(config, f"{name}.embed_tokens.weight", is_copy=True),
    _vector_tensor(f"{name}.enorm.weight", (*path, "embed_norm", "scale"), config.embed, index),
    _vector_tensor(f"{name}.hnorm.weight", (*path, "hidden_norm", "scale"), config.embed, index),
    _matrix_tensor(f"{name}.eh_proj", (*path, "proj"), (2 * config.embed,), (config.embed,), index),
    *_block_tensors(config, layer, (*path, "block"), index, config.moe.num_routed_experts > 0),
    _vector_tensor(f"{name}.shared_head.norm.weight", (*path, "norm", "scale"), config.embed, index),
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
  tensors.append(_vector_tensor("model.norm.weight", ("final_norm", "scale"), config.embed))
  return tensors if config.tied_embeddings else [*tensors, _head_tensor(config)]
