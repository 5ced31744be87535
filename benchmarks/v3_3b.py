"""A V3 of 2.8B parameters for one 80 GB GPU: MLA, sigmoid router with bias, a shared expert, MTP, 4096 positions.

python -m benchmarks.train_step --config=benchmarks/v3_3b.py      (part of: python -m benchmarks.gpu --part=2)

Master weights and both moments are float32. Widths are multiples of 128, which the FP8 kernels for Hopper need.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    dict(
      name="v3_3b",
      model=dict(
        vocab=32_768,
        embed=2048,
        layers=12,
        first_dense_layers=1,
        num_mtp_layers=1,
        mlp=5632,
        init_std=0.02,
        remat="full",
        attention=dict(
          kind="mla", heads=16, q_lora_rank=768, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
          v_head_dim=128,
        ),
        moe=dict(
          num_routed_experts=32, num_shared_experts=1, num_experts_per_token=4, mlp=1024, score="sigmoid",
          num_expert_groups=8, topk_groups=4, group_score="top2_sum", router_bias=True, norm_topk_prob=True,
          route_scale=2.5,
        ),
      ),
      data=dict(tokenizer="tokenizer.json", seq=4096),
      balance=dict(bias_update_rate=1e-3, expert_loss=1e-4),
      parallel=dict(zero=1),  # weights are cast once a step, gradients of a microbatch are bfloat16
      train=dict(global_batch=16, microbatch=4),
    )
  )  # fmt: skip
