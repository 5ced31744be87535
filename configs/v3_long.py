"""DeepSeek-V3 with its context extension: 671.0B parameters, v3.py at 4K, then 1,000 steps each at 32K and 128K (arXiv:2412.19437).

Section 4.3 has lengths, steps, batches, the learning rate and YaRN, which is on from the first extension. It says nothing of the
optimizer state, which goes on, nor of a warm-up: there is none.
"""

from ml_collections import ConfigDict

T = 1_000_000_000_000
TOKENS = 14_800_000_000_000  # section 4.2
START, BATCH, SEQ = 3072, 15_360, 4096  # section 4.2
MICRO = 1024  # of the whole mesh, found by plan --search for v5p:8x8x16; the report does not say its own
RAMP = 469_000_000_000  # section 4.2
# Section 4.3: 1,000 steps at each length. Pre-training ends with a whole batch, less than one of these steps beyond TOKENS.
BATCH_32K, BATCH_128K = 1920, 480  # section 4.3
UNTIL_32K = TOKENS + 1000 * BATCH_32K * 32_768  # section 4.3
UNTIL_128K = UNTIL_32K + 1000 * BATCH_128K * 131_072  # section 4.3


def get_config():
  # Section 4.3: as V2's, s = 40, alpha = 1 (beta_slow, the default), beta = 32 (beta_fast, the default), of the decoupled key, and
  # sqrt(t) = 0.1 ln s + 1 (mscale 1, the default).
  yarn = dict(factor=40.0, original_seq=SEQ)
  # Section 4.3: the last learning rate of pre-training.
  schedule = dict(kind="constant", peak=7.3e-6, warmup_steps=0, tokens=0, milestones=(), factors=())
  return ConfigDict(
    dict(
      name="v3_long",
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
      train=dict(  # batch and ramp: see above; the stages say when it ends
        steps=0, global_batch=BATCH, microbatch=MICRO, batch_ramp_from=START, batch_ramp_tokens=RAMP
      ),
      stages=(
        dict(name="4k", until_tokens=TOKENS),
        dict(
          name="32k",
          until_tokens=UNTIL_32K,
          data=dict(seq=32_768),
          model=dict(attention=dict(yarn=yarn)),
          schedule=schedule,
          # 1,920 sequences divide over 128 groups of devices, not over 512 as in pre-training; `tensor` shards the experts as much.
          mesh=dict(expert=128, context=4, tensor=2),
          train=dict(global_batch=BATCH_32K, microbatch=128, batch_ramp_from=0, batch_ramp_tokens=0),
        ),
        dict(
          name="128k",
          until_tokens=UNTIL_128K,
          data=dict(seq=131_072),
          model=dict(attention=dict(yarn=yarn)),
          schedule=schedule,
          mesh=dict(expert=32, context=4, tensor=8),  # 480 sequences divide over 32 groups of devices
          train=dict(global_batch=BATCH_128K, microbatch=32, batch_ramp_from=0, batch_ramp_tokens=0),
        ),
      ),
    )
  )  # fmt: skip
