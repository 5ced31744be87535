"""DeepSeek-V3, R1's base: 671.0B parameters, 37.6B active, MLA, router bias, MTP, 14.8T tokens (arXiv:2412.19437).

YaRN is off: it belongs to the extension to 128K that follows pre-training at 4K.
"""

import math

from ml_collections import ConfigDict

T = 1_000_000_000_000
TOKENS = 14_800_000_000_000  # section 4.2
START, BATCH, SEQ = 3072, 15_360, 4096  # section 4.2
MICRO = 1024  # of the whole mesh, found by plan --search for v5p:8x8x16; the report does not say its own
RAMP = 469_000_000_000  # section 4.2


def get_config():
  # The batch grows linearly in tokens, rounded down to whole microbatches: half of one less on average.
  ramp_steps = RAMP * math.log((BATCH - MICRO / 2) / (START - MICRO / 2)) / ((BATCH - START) * SEQ)
  steps = math.ceil(ramp_steps + (TOKENS - RAMP) / (BATCH * SEQ))  # as many as the tokens take
  return ConfigDict(
    dict(
      name="v3",
      model=dict(  # section 4.2
        vocab=129_280,  # DeepSeek's inference/configs/config_671B.json
        embed=7168,
        layers=61,
        first_dense_layers=3,
        num_mtp_layers=1,
        mlp=18_432,  # DeepSeek's inference/configs/config_671B.json
        init_std=0.006,  # the released config.json has 0.02
        attention=dict(  # section 4.2
          kind="mla", heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
          v_head_dim=128,
        ),
        moe=dict(  # section 4.2
          num_routed_experts=256, num_shared_experts=1, num_experts_per_token=8, mlp=2048, num_expert_groups=8,
          topk_groups=4,
          score="sigmoid", group_score="top2_sum", router_bias=True, norm_topk_prob=True,  # section 2.1.2
          route_scale=2.5,  # DeepSeek's inference/configs/config_671B.json
          buffer_factor=2.0,  # room for the worst case does not fit; a step that overflows this is skipped
        ),
      ),
      data=dict(tokenizer="deepseek-v3", seq=SEQ),  # sections 4.1 and 4.2
      optimizer=dict(  # section 4.2
        clip=1.0, beta1=0.9, beta2=0.95, weight_decay=0.1,
        moments_dtype="bfloat16",  # section 3.3.3
      ),
      schedule=dict(  # section 4.2: constant to 10T, cosine over 4.3T to 2.2e-5, 333B of that, 167B at 7.3e-6
        kind="wsd", peak=2.2e-4, warmup_steps=2000, tokens=TOKENS,
        milestones=(10 * T / TOKENS, 14.3 * T / TOKENS, 14.633 * T / TOKENS), factors=(0.1, 7.3e-6 / 2.2e-4),
      ),
      # Section 4.2; the released config.json has 0.001 for the last.
      balance=dict(bias_update_rate=0.001, bias_update_tokens=143 * T // 10, expert_loss=1e-4),
      mtp=dict(weights=(0.3, 0.1), tokens=(10 * T,)),  # section 4.2
      mesh=dict(data=1, fsdp=-1, expert=256, context=2),  # found by plan --search for v5p:8x8x16, where fsdp is 2
      train=dict(  # steps, batch and ramp: see above
        steps=steps, global_batch=BATCH, microbatch=MICRO, batch_ramp_from=START, batch_ramp_tokens=RAMP
      ),
    )
  )  # fmt: skip
