"""DeepSeek-V3 in small: 0.5M parameters, MLA, 8 experts, MTP; learns Python on two CPU cores in minutes.

`make train` runs it. Its data is the interpreter's own library. "V3" below is arXiv:2412.19437.
"""

from ml_collections import ConfigDict

STEPS = 700  # chosen so that a run takes minutes on two CPU cores


def get_config():
  return ConfigDict(
    dict(
      name="tiny",
      # Sizes chosen for the lowest loss after minutes on two CPU cores: a wider or deeper model sees fewer tokens.
      model=dict(
        vocab=272,  # 256 bytes + the document separator, padded to a multiple of 16
        embed=128,
        layers=2,
        first_dense_layers=1,
        num_mtp_layers=1,
        mlp=384,
        init_std=0.02,  # GPT-2's; 0.006 is for DeepSeek's widths of 1280 and more
        compute_dtype="float32",  # what CPUs multiply fastest everywhere
        remat="none",  # all activations fit in memory
        attention=dict(  # V3's form: a head's widths are in V3's ratio of 2 (nope) to 1 (rope) to 2 (values)
          kind="mla", heads=2, q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
          rope_theta=300.0,  # sequences are short: measured better than 10,000
        ),
        moe=dict(  # V3's router (section 2.1.2), with fewer experts and groups
          num_routed_experts=8, num_shared_experts=1, num_experts_per_token=2, mlp=64, score="sigmoid",
          num_expert_groups=4, topk_groups=2, group_score="top2_sum", router_bias=True, norm_topk_prob=True,
          route_scale=1.0,
        ),
      ),
      data=dict(seq=256, heldout_fraction=0.05),  # 5% of a small corpus: 0.4 MB to compare models on
      optimizer=dict(kind="muon", eps=1e-20),  # V4's: ahead of AdamW from the first minutes on (docs/results/optimizers.md)
      schedule=dict(kind="warmup_cosine", peak=2e-2, warmup_steps=30, steps=STEPS, factors=(0.02,)),  # set by hand
      balance=dict(bias_update_rate=0.001, expert_loss=1e-4),  # V3, section 4.2
      mtp=dict(weights=(0.3, 0.1), tokens=(1_000_000,)),  # V3, section 4.2: lowered after two thirds of the tokens
      train=dict(steps=STEPS, global_batch=8),  # 2,048 tokens a step, so that there are hundreds of steps
      checkpoint=dict(every=250),  # about a minute of work
      eval=dict(every=250, sequences=128),  # seconds, beside a minute of steps
      log=dict(every=1),  # a line costs nothing beside a step
    )
  )  # fmt: skip
