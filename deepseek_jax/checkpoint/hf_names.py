"""Which tensor of a Hugging Face checkpoint is which part of our parameters: one table, read in both directions."""

import dataclasses
import math

from deepseek_jax.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of the checkpoint.

  path: keys of the array in our tree; index: where in its leading dimensions (layer, expert) the tensor belongs.
  shape: as in the checkpoint. ours: of our part. transposed: the checkpoint has [out, in], we have in before out.
  buffer: the array is in the buffers. copy: a second name of an array that has an entry of its own; written, not read.
  """

  name: str
  path: tuple[str, ...]
  index: tuple[int, ...]
  shape: tuple[int, ...]
  ours: tuple[int, ...]
  transposed: bool = False
  buffer: bool = False
  copy: bool = False

  def to_ours(self, tensor):
    """[shape], as in the checkpoint, to our [ours]."""
    return tensor.T.reshape(self.ours) if self.transposed else tensor

  def to_hf(self, part):
    """Our [ours] to [shape], as in the checkpoint."""
    return part.reshape(self.shape[::-1]).T if self.transposed else part


def matrix(name, path, inputs, outputs, index=(), **kwargs):
  """A linear map between dimensions that may be several with us: [embed] to [heads, head_dim], for one."""
  shape = (math.prod(outputs), math.prod(inputs))
  return Entry(name + ".weight", (*path, "kernel"), index, shape, (*inputs, *outputs), transposed=True, **kwargs)


def vector(name, path, width, index=(), **kwargs):
  """A tensor of one dimension, the same on both sides."""
  return Entry(name, path, index, (width,), (width,), **kwargs)


def swiglu(name, path, embed, mlp, index):
  """The three matrices of a SwiGLU (LlamaMLP): gate and up are [mlp, embed] in the checkpoint, down is [embed, mlp]."""
  return [
    matrix(f"{name}.gate_proj", (*path, "gate"), (embed,), (mlp,), index),
    matrix(f"{name}.up_proj", (*path, "up"), (embed,), (mlp,), index),
    matrix(f"{name}.down_proj", (*path, "down"), (mlp,), (embed,), index),
  ]


def attention(config: ModelConfig, name, path, index):
  """Grouped-query (LlamaAttention) or latent attention (DeepseekV3Attention): [heads * width, inputs] in the checkpoint."""
  a, embed = config.attention, (config.embed,)
  if a.kind == "gqa":
    return [
      matrix(f"{name}.q_proj", (*path, "q"), embed, (a.heads, a.head_dim), index),
      matrix(f"{name}.k_proj", (*path, "k"), embed, (a.kv_heads, a.head_dim), index),
      matrix(f"{name}.v_proj", (*path, "v"), embed, (a.kv_heads, a.head_dim), index),
      matrix(f"{name}.o_proj", (*path, "o"), (a.heads, a.head_dim), embed, index),
    ]
  query = (a.heads, a.qk_nope_head_dim + a.qk_rope_head_dim)
  if a.q_lora_rank:
    queries = [
      matrix(f"{name}.q_a_proj", (*path, "q_a"), embed, (a.q_lora_rank,), index),
      vector(f"{name}.q_a_layernorm.weight", (*path, "q_norm", "scale"), a.q_lora_rank, index),
      matrix(f"{name}.q_b_proj", (*path, "q_b"), (a.q_lora_rank,), query, index),
    ]
  else:
    queries = [matrix(f"{name}.q_proj", (*path, "q"), embed, query, index)]
  key_value = (a.heads, a.qk_nope_head_dim + a.v_head_dim)
  return queries + [
    matrix(f"{name}.kv_a_proj_with_mqa", (*path, "kv_a"), embed, (a.kv_lora_rank + a.qk_rope_head_dim,), index),
    vector(f"{name}.kv_a_layernorm.weight", (*path, "kv_norm", "scale"), a.kv_lora_rank, index),
    matrix(f"{name}.kv_b_proj", (*path, "kv_b"), (a.kv_lora_rank,), key_value, index),
    matrix(f"{name}.o_proj", (*path, "o"), (a.heads, a.v_head_dim), embed, index),
  ]


def experts(config: ModelConfig, name, path, index):
  """Router [experts, embed], its bias [experts], each expert and the shared ones, fused with us too (DeepseekV3MoE)."""
  moe, embed = config.moe, config.embed
  rows = [matrix(f"{name}.gate", (*path, "router"), (embed,), (moe.num_routed_experts,), index)]
  if moe.router_bias:
    bias = f"{name}.gate.e_score_correction_bias"
    rows.append(vector(bias, (*path, "router", "bias"), moe.num_routed_experts, index, buffer=True))
  for expert in range(moe.num_routed_experts):
    rows += swiglu(f"{name}.experts.{expert}", (*path, "experts"), embed, moe.mlp, (*index, expert))
  if moe.num_shared_experts:
    rows += swiglu(f"{name}.shared_experts", (*path, "shared"), embed, moe.num_shared_experts * moe.mlp, index)
  return rows


def block(config: ModelConfig, layer, path, index, is_moe):
  """Every tensor of model.layers.`layer`; `path` and `index` say where our block is."""
  name = f"model.layers.{layer}"
  return [
    vector(f"{name}.input_layernorm.weight", (*path, "attn_norm", "scale"), config.embed, index),
    *attention(config, f"{name}.self_attn", (*path, "attn"), index),
    vector(f"{name}.post_attention_layernorm.weight", (*path, "mlp_norm", "scale"), config.embed, index),
    *(
      experts(config, f"{name}.mlp", (*path, "moe"), index)
      if is_moe
      else swiglu(f"{name}.mlp", (*path, "mlp"), config.embed, config.mlp, index)
    ),
  ]


def embedding(config: ModelConfig, name="model.embed_tokens.weight", **kwargs):
  """[vocab, embed] on both sides."""
  shape = (config.vocab, config.embed)
  return Entry(name, ("embed",), (), shape, shape, **kwargs)


def head(config: ModelConfig, name="lm_head", **kwargs):
  """[vocab, embed] in the checkpoint, [embed, vocab] with us; the embedding where the two are tied."""
  if config.tied_embeddings:
    return embedding(config, name + ".weight", **kwargs)
  return matrix(name, ("head",), (config.embed,), (config.vocab,), **kwargs)


def mtp_layer(config: ModelConfig, depth):
  """Depth `depth` of multi-token prediction is one more layer, with copies of the main model's embedding and head."""
  layer, index, path = config.layers + depth, (depth,), ("mtp_layers",)
  name = f"model.layers.{layer}"
  return [
    embedding(config, f"{name}.embed_tokens.weight", copy=True),
    vector(f"{name}.enorm.weight", (*path, "embed_norm", "scale"), config.embed, index),
    vector(f"{name}.hnorm.weight", (*path, "hidden_norm", "scale"), config.embed, index),
    matrix(f"{name}.eh_proj", (*path, "proj"), (2 * config.embed,), (config.embed,), index),
    *block(config, layer, (*path, "block"), index, config.moe.num_routed_experts > 0),
    vector(f"{name}.shared_head.norm.weight", (*path, "norm", "scale"), config.embed, index),
    head(config, f"{name}.shared_head.head", copy=True),
  ]


def entries(config: ModelConfig) -> list[Entry]:
  """Every tensor that a checkpoint of `config` has, in the order in which it is written."""
  rows, dense = [embedding(config)], config.num_dense_layers
  for layer in range(config.layers):
    is_moe = layer >= dense
    index = (layer - dense,) if is_moe else (layer,)
    rows += block(config, layer, ("moe_layers" if is_moe else "dense_layers",), index, is_moe)
  for depth in range(config.num_mtp_layers):
    rows += mtp_layer(config, depth)
  rows.append(vector("model.norm.weight", ("final_norm", "scale"), config.embed))
  return rows if config.tied_embeddings else [*rows, head(config)]
