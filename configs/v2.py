"""DeepSeek-V2 236B, 21B active (arXiv:2405.04434, section 3.1): latent attention, experts in 8 groups, 8.1T tokens.

Route scale 16 and inner widths from the released config.json. YaRN is off: it belongs to the extension that follows
pre-training at 4K. The paper's "additional scaling factors at the width bottlenecks" are in no release, nor here.
"""

import math

from ml_collections import ConfigDict

TOKENS = 8_100_000_000_000
START, BATCH, SEQ = 2304, 9216, 4096
MICRO = 256  # of the whole mesh, a sequence on each pair of devices; the paper does not say its own
RAMP = 225_000_000_000


def get_config():
  # The batch grows linearly in tokens, rounded down to whole microbatches: half of one less on average.
  ramp_steps = RAMP * math.log((BATCH - MICRO / 2) / (START - MICRO / 2)) / ((BATCH - START) * SEQ)
  steps = math.ceil(ramp_steps + (TOKENS - RAMP) / (BATCH * SEQ))
  return ConfigDict(
    dict(
      name="v2",
      model=dict(
        vocab=102_400,
        embed=5120,
        layers=60,
        first_dense_layers=1,
        mlp=12_288,
        init_std=0.006,
        remat="dots",
        attention=dict(
          kind="mla", heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
          v_head_dim=128,
        ),
        moe=dict(
          num_routed_experts=160, num_shared_experts=2, num_experts_per_token=6, mlp=1536, num_expert_groups=8,
          topk_groups=3, route_scale=16.0, dispatch="capacity", capacity_factor=1.0, no_drop_fraction=0.1,
          buffer_factor=2.0,
        ),
      ),
      data=dict(tokenizer="deepseek-llm", seq=SEQ),
      optimizer=dict(clip=1.0, beta1=0.9, beta2=0.95, weight_decay=0.1),
      schedule=dict(  # drops at 60% and 90%, unlike the other models' 80% and 90%
        kind="multi_step", peak=2.4e-4, warmup_steps=2000, tokens=TOKENS, milestones=(0.6, 0.9), factors=(0.316, 0.1)
      ),
      # Section 3.1.2; the released config.json has 0.001 for the first.
      balance=dict(expert_loss=0.003, device_loss=0.05, communication_loss=0.02),
      mesh=dict(data=1, fsdp=-1, expert=32, context=2),  # fsdp=8 on v5p:8x8x8
      train=dict(
        steps=steps, global_batch=BATCH, microbatch=MICRO, batch_ramp_from=START, batch_ramp_tokens=RAMP
      ),
    )
  )  # fmt: skip
