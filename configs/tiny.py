"""DeepSeek-V3 in miniature, which learns Python from the interpreter's own library in a few minutes on two CPU cores.

make train
"""

from ml_collections import ConfigDict

STEPS = 700


def get_config():
  return ConfigDict(
    dict(
      name="tiny",
      model=dict(
        vocab=272,  # 256 bytes + the document separator, padded so that tensor=4 divides it
        embed=192,
        layers=4,
        first_dense_layers=1,
        num_mtp_layers=1,
        mlp=512,
        init_std=0.02,
        compute_dtype="float32",  # what CPUs multiply fastest everywhere
        attention=dict(
          kind="mla", heads=4, q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
        ),
        moe=dict(
          num_routed_experts=8, num_shared_experts=1, num_experts_per_token=2, mlp=192, score="sigmoid",
          num_expert_groups=4, topk_groups=2, group_score="top2_sum", router_bias=True, norm_topk_prob=True,
          route_scale=1.0,
        ),
      ),
      data=dict(seq=256, heldout_fraction=0.05),
      schedule=dict(kind="warmup_cosine", peak=3e-3, warmup_steps=100, steps=STEPS, factors=(0.1,)),
      balance=dict(bias_update_rate=0.001, expert_loss=1e-4),
      mtp=dict(weights=(0.3, 0.1), tokens=(1_000_000,)),
      train=dict(steps=STEPS, global_batch=8),
      checkpoint=dict(every=250),
      eval=dict(every=250, sequences=128),
      log=dict(every=1),
    )
  )  # fmt: skip
