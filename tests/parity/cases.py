"""The models whose outputs are compared with transformers: config.json as DeepSeek publishes it, and their inputs.

Where Hugging Face and DeepSeek's inference code differ, transformers 5.23 is the reference:
- v3_plain: `norm_topk_prob` false leaves sigmoid weights as they are; the inference code always normalizes them.
- v3_eps: the norms of both latents have 1e-6 whatever `rms_norm_eps` says; the inference code has one epsilon for all.
- v3_mscale: cos and sin are scaled by mscale / mscale_all_dim, and the softmax scale grows with mscale_all_dim; the
  inference code scales the softmax with mscale and leaves cos and sin alone.
- V2's `norm_topk_prob`: transformers does not read it, so true is refused; every published V2 has it false.
- v3_mtp: the hidden state that is fed to multi-token prediction has passed the final norm; DeepSeek publishes no code.
"""

import dataclasses

import numpy as np

SHAPE = {
  "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
  "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.006, "bos_token_id": 0, "eos_token_id": 1,
  "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "use_cache": True, "torch_dtype": "float32",
  "rope_theta": 10000.0, "rope_scaling": None,
}  # fmt: skip


def yarn(original, mscale, mscale_all_dim=None, factor=40.0):
  return {
    "type": "yarn", "factor": factor, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": mscale,
    "mscale_all_dim": mscale_all_dim or mscale, "original_max_position_embeddings": original,
  }  # fmt: skip


LLAMA = {
  **SHAPE, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "pretraining_tp": 1, "intermediate_size": 172,
  "num_hidden_layers": 2, "max_position_embeddings": 64,
}  # fmt: skip
MOE = {
  **SHAPE, "moe_intermediate_size": 24, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3,
  "first_k_dense_replace": 1, "moe_layer_freq": 1, "aux_loss_alpha": 0.001, "seq_aux": True,
  "scoring_func": "softmax", "norm_topk_prob": False,
}  # fmt: skip
MOE_V1 = {
  **MOE, "architectures": ["DeepseekForCausalLM"], "model_type": "deepseek", "intermediate_size": 172,
  "max_position_embeddings": 64,
}  # fmt: skip
MLA = {
  **MOE, "intermediate_size": 160, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
  "max_position_embeddings": 1280, "ep_size": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
V2_LITE = {
  **MLA, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "q_lora_rank": None,
  "topk_method": "greedy", "routed_scaling_factor": 1.0, "rope_scaling": yarn(32, 0.707),
}  # fmt: skip
V2 = {
  **V2_LITE, "q_lora_rank": 40, "topk_method": "group_limited_greedy", "n_routed_experts": 16, "n_group": 4,
  "topk_group": 2, "num_experts_per_tok": 4, "routed_scaling_factor": 16.0,
}  # fmt: skip
V3 = {
  **MLA, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "q_lora_rank": 40,
  "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
  "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
  "num_nextn_predict_layers": 0, "rope_scaling": yarn(32, 1.0),
}  # fmt: skip
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


@dataclasses.dataclass(frozen=True)
class Case:
  """A model and its input.

  config: config.json. batch, seq: of the tokens. bias: added to every router bias. shard: bytes a safetensors file
  holds, 0 for one file. seed: of weights and tokens. A `quantization_config` in `config` makes the files FP8.
  """

  config: dict
  batch: int = 2
  seq: int = 32
  bias: float = 0.0
  shard: int = 0
  seed: int = 0

  @property
  def tokens(self):
    return np.random.default_rng([self.seed, 7]).integers(0, self.config["vocab_size"], (self.batch, self.seq))

  @property
  def mtp_weight(self):
    return 0.3 if self.config.get("num_nextn_predict_layers") else 0.0


CASES = {
  "dense_mha": Case(LLAMA),  # as DeepSeek LLM 7B
  "dense_gqa": Case(  # as 67B
    LLAMA | {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2}, shard=60_000
  ),
  "dense_tied": Case(LLAMA | {"tie_word_embeddings": True}),
  "dense_eps": Case(LLAMA | {"rms_norm_eps": 0.3}),
  "moe_v1": Case(MOE_V1),  # as DeepSeekMoE 16B: its class is remote code, see reference.py
  "v2_lite": Case(V2_LITE, seq=96),  # three times the original context
  "v2": Case(V2, seq=72),
  "v2_norope_scaling": Case(V2_LITE | {"rope_scaling": None, "q_lora_rank": 40}),  # no mscale in the softmax scale
  "v3": Case(V3, seq=48),
  "v3_first3": Case(
    V3 | {"num_hidden_layers": 5, "first_k_dense_replace": 3, "n_routed_experts": 8, "num_experts_per_tok": 3},
    seq=40, shard=100_000,
  ),
  "v3_yarn_long": Case(  # four times the original context
    V3 | {"num_hidden_layers": 2, "qk_rope_head_dim": 16, "rope_scaling": yarn(64, 1.0), "max_position_embeddings": 2560},
    batch=1, seq=256,
  ),
  "v3_plain": Case(
    V3 | {"rope_scaling": None, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}
  ),
  "v3_negbias": Case(V3, bias=-1.5),  # scores with bias are all negative: a dropped group must not count as 0
  "v3_eps": Case(V3 | {"rms_norm_eps": 0.3}),
  "v3_mscale": Case(V3 | {"rope_scaling": yarn(32, 1.3, 0.6)}, seq=48),
  "v3_mtp": Case(V3 | {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}, seq=48),
  "v3_fp8": Case(
    V3 | {
      "num_hidden_layers": 2, "hidden_size": 160, "intermediate_size": 136, "moe_intermediate_size": 40,
      "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "quantization_config": FP8,
    }
  ),
}  # fmt: skip
