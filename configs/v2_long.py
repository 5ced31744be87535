"""DeepSeek-V2 with its context extension: 235.7B parameters, v2.py at 4K, then 1,000 steps at 32K (arXiv:2405.04434).

Section 3.1.4 has the length, the steps, the batch and YaRN. It does not give the learning rate of the extension: here it is the one
that pre-training ends with, as DeepSeek-V3's is. The optimizer goes on. The paper's model then takes 128K without training at it.
"""

from ml_collections import ConfigDict

TOKENS = 8_100_000_000_000  # section 3.1.1
START, BATCH, SEQ = 2304, 9216, 4096  # section 3.1.2
MICRO = 256  # of the whole mesh: a sequence on each pair of devices; the paper does not say its own
RAMP = 225_000_000_000  # section 3.1.2
PEAK, LAST_FACTOR = 2.4e-4, 0.1  # section 3.1.2
LONG_BATCH, LONG_SEQ = 576, 32_768  # section 3.1.4
# 1,000 steps (section 3.1.4). Pre-training ends with a whole batch, 37M tokens beyond TOKENS, which are almost two of these steps.
LONG_TOKENS = 1001 * LONG_BATCH * LONG_SEQ


def get_config():
  return ConfigDict(
    dict(
      name="v2_long",
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
        kind="multi_step", peak=PEAK, warmup_steps=2000, tokens=TOKENS, milestones=(0.6, 0.9), factors=(0.316, LAST_FACTOR)
      ),
      # Section 3.1.2; the released config.json has 0.001 for the first.
      balance=dict(expert_loss=0.003, device_loss=0.05, communication_loss=0.02),
      mesh=dict(data=1, fsdp=-1, expert=32, context=2),  # found by plan --search for v5p:8x8x8, where fsdp is 8
      train=dict(  # batch and ramp: see above; the stages say when it ends
        steps=0, global_batch=BATCH, microbatch=MICRO, batch_ramp_from=START, batch_ramp_tokens=RAMP
      ),
      stages=(
        dict(name="4k", until_tokens=TOKENS),
        dict(
          name="32k",
          until_tokens=TOKENS + LONG_TOKENS,
          data=dict(seq=LONG_SEQ),
          model=dict(
            # Section 3.1.4: s, alpha (beta_slow, the default 1), beta (beta_fast, the default 32), the original 4K; sqrt(t) =
            # 0.0707 ln s + 1, as config.json of deepseek-ai/DeepSeek-V2 has it.
            attention=dict(yarn=dict(factor=40.0, original_seq=SEQ, mscale=0.707, mscale_all_dim=0.707)),
            remat="full",  # products of so many tokens do not fit
          ),
          schedule=dict(kind="constant", peak=PEAK * LAST_FACTOR, warmup_steps=0, tokens=0, milestones=(), factors=()),
          # 576 sequences do not divide over 256 groups of devices, as pre-training has them. On v5p:8x8x8 fsdp is 2: 64 groups.
          mesh=dict(context=8),
          train=dict(global_batch=LONG_BATCH, microbatch=64, batch_ramp_from=0, batch_ramp_tokens=0),
        ),
      ),
    )
  )  # fmt: skip
