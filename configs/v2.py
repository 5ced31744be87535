"""DeepSeek-V2: 235.7B parameters, 21.4B active, MLA, experts in 8 groups, 8.1T tokens (arXiv:2405.04434).

YaRN is off: it belongs to the extension that follows pre-training at 4K. The paper's "additional scaling factors at the
width bottlenecks" are in no release, nor here.
"""

import math

from ml_collections import ConfigDict

TOKENS = 8_100_000_000_000  # section 3.1.1
START, BATCH, SEQ = 2304, 9216, 4096  # section 3.1.2
MICRO = 256  # of the whole mesh: a sequence on each pair of devices; the paper does not say its own
RAMP = 225_000_000_000  # section 3.1.2


def get_config():
  # The batch grows linearly in tokens, rounded down to whole microbatches: half of one less on average.
  ramp_steps = RAMP * math.log((BATCH - MICRO / 2) / (START - MICRO / 2)) / ((BATCH - START) * SEQ)
  steps = math.ceil(ramp_steps + (TOKENS - RAMP) / (BATCH * SEQ))  # as many as the tokens take
  return ConfigDict(
    dict(
      name="v2",
      model=dict(  # section 3.1.2
        vocab=102_400,  # DeepSeek's inference/configs/config_236B.json
        embed=5120,
        layers=60,
        first_dense_layers=1,
        mlp=12_288,  # DeepSeek's inference/configs/config_236B.json
        init_std=0.006,
        remat="dots",  # found by plan --search for v5p:8x8x8: products fit, and need not be made again
        attention=dict(  # section 3.1.2
          kind="mla", heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
          v_head_dim=128,
        ),
        moe=dict(  # section 3.1.2
          num_routed_experts=160, num_shared_experts=2, num_experts_per_token=6, mlp=1536, num_expert_groups=8,
          topk_groups=3,
          route_scale=16.0,  # config.json of deepseek-ai/DeepSeek-V2, also inference/configs/config_236B.json
          dispatch="capacity", capacity_factor=1.0, no_drop_fraction=0.1,  # section 2.2.4
          buffer_factor=2.0,  # room for the worst case does not fit; a step that overflows this is skipped
        ),
      ),
      data=dict(tokenizer="deepseek-llm", seq=SEQ),  # sections 3.1.1 (DeepSeek 67B's tokenizer) and 3.1.2
      optimizer=dict(clip=1.0, beta1=0.9, beta2=0.95, weight_decay=0.1),  # section 3.1.2
      schedule=dict(  # section 3.1.2: drops at 60% and 90%, unlike the other models' 80% and 90%
        kind="multi_step", peak=2.4e-4, warmup_steps=2000, tokens=TOKENS, milestones=(0.6, 0.9), factors=(0.316, 0.1)
      ),
      # Section 3.1.2; the released config.json has 0.001 for the first.
      balance=dict(expert_loss=0.003, device_loss=0.05, communication_loss=0.02),
      mesh=dict(data=1, fsdp=-1, expert=32, context=2),  # found by plan --search for v5p:8x8x8, where fsdp is 8
      train=dict(  # steps, batch and ramp: see above
        steps=steps, global_batch=BATCH, microbatch=MICRO, batch_ramp_from=START, batch_ramp_tokens=RAMP
      ),
    )
  )  # fmt: skip
