"""The models of the tests, in miniature: a dense one, and one with all that DeepSeek-V3 has.

Tests change the fields they are about.
"""

import dataclasses

from deepseek_jax.config import Config
from deepseek_jax.config_sections import BalanceConfig, DataConfig, MeshConfig, TrainConfig
from deepseek_jax.model_config import AttentionConfig, ModelConfig, MoEConfig

GQA = AttentionConfig(heads=8, kv_heads=4, head_dim=8)
MLA = AttentionConfig(
  kind="mla", heads=8, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6
)
MOE = MoEConfig(
  num_routed_experts=8, num_shared_experts=1, num_experts_per_token=3, mlp=16, score="sigmoid", num_expert_groups=4,
  topk_groups=2, group_score="top2_sum", router_bias=True, norm_topk_prob=True, route_scale=2.5,
)  # fmt: skip
HASH_MOE = dataclasses.replace(MOE, router="hash", router_bias=False, topk_groups=4)
DENSE = ModelConfig(vocab=64, embed=32, layers=2, mlp=48, init_std=0.1, compute_dtype="float32", attention=GQA)
# Latent attention, a dense layer and two of experts in groups, with a bias of the router; multi-token prediction.
V3 = dataclasses.replace(DENSE, layers=3, first_dense_layers=1, num_mtp_layers=1, attention=MLA, moe=MOE)
# Every balance loss that there is.
BALANCE = BalanceConfig(
  expert_loss=0.01, device_loss=0.02, communication_loss=0.03, router_z_loss=0.001, bias_update_rate=0.01
)


def make_config(model: ModelConfig, seq: int, global_batch: int, microbatch: int = 0, **train) -> Config:
  """A Config to train `model` on one device. `train`: more fields of TrainConfig."""
  return Config(
    model=model,
    data=DataConfig(seq=seq, tokenizer="tokenizer.json"),
    train=TrainConfig(global_batch=global_batch, microbatch=microbatch, **train),
    mesh=MeshConfig(data=1),
    balance=BALANCE if model.num_moe_layers else BalanceConfig(),
  )  # fmt: skip


def with_model(config: Config, **fields) -> Config:
  """`config` with other `fields` of its model."""
  return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))


def with_moe(model: ModelConfig, **fields) -> ModelConfig:
  """`model` with other `fields` of its experts."""
  return dataclasses.replace(model, moe=dataclasses.replace(model.moe, **fields))


def float64(config: Config) -> Config:
  """`config` with parameters, products and moments in float64, for which jax.enable_x64 is to be set."""
  model = dataclasses.replace(config.model, param_dtype="float64", compute_dtype="float64")
  return dataclasses.replace(
    config, model=model, optimizer=dataclasses.replace(config.optimizer, moments_dtype="float64")
  )


# A whole run of the command line: a config file with the text's folder, the cache and the number of steps to be filled
# in.
RUN = """
from ml_collections import ConfigDict

def get_config():
  return ConfigDict(dict(
    name="process",
    model=dict(vocab=264, embed=32, layers=3, first_dense_layers=1, num_mtp_layers=1, mlp=48, init_std=0.1,
               compute_dtype="float32", remat="none",
               attention=dict(kind="mla", heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
                              qk_rope_head_dim=4, v_head_dim=8),
               moe=dict(num_routed_experts=4, num_shared_experts=1, num_experts_per_token=2, mlp=16, score="sigmoid",
                        router_bias=True, norm_topk_prob=True)),
    balance=dict(bias_update_rate=0.01, expert_loss=1e-3),
    mtp=dict(weights=(0.3, 0.1), tokens=(1000,)),
    data=dict(sources=({source!r},), cache={cache!r}, seq=32, heldout_fraction=0.2),
    schedule=dict(kind="warmup_cosine", peak=3e-3, warmup_steps=4, steps={steps}, factors=(0.1,)),
    train=dict(steps={steps}, global_batch=8, microbatch=4, batch_ramp_from=4, batch_ramp_tokens=800),
    checkpoint=dict(every=3, keep=3),
    eval=dict(every=5, sequences=8, final_sequences=20),
    log=dict(every=1),
    sample=dict(max_tokens=5),
  ))
"""


def write_texts(folder, files: int, words: int) -> None:
  """Makes `folder` with that many short texts of code to train on, as the text of RUN."""
  folder.mkdir()
  for i in range(files):
    (folder / f"{i}.txt").write_text(" ".join(f"def f{i * j % 17} ( x ) = y + {j % 7}" for j in range(words)))
