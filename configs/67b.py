"""DeepSeek LLM 67B (arXiv:2401.02954, tables 2 and 3): grouped-query attention, 2T tokens.

Shape from table 2 and the released config.json (inner width 22016); training from section 2.3 and table 2.
"""

from ml_collections import ConfigDict

TOKENS = 2_000_000_000_000
BATCH, SEQ = 4608, 4096


def get_config():
  steps = -(-TOKENS // (BATCH * SEQ))
  return ConfigDict(
    dict(
      name="67b",
      model=dict(
        vocab=102_400,
        embed=8192,
        layers=95,
        mlp=22_016,
        init_std=0.006,
        remat="dots",
        attention=dict(heads=64, kv_heads=8, head_dim=128, rope_theta=10_000.0),
      ),
      data=dict(tokenizer="deepseek-llm", seq=SEQ),
      optimizer=dict(clip=1.0, beta1=0.9, beta2=0.95, weight_decay=0.1),
      schedule=dict(
        kind="multi_step", peak=3.2e-4, warmup_steps=2000, tokens=TOKENS, milestones=(0.8, 0.9), factors=(0.316, 0.1)
      ),
      mesh=dict(data=1, fsdp=-1, context=2),  # fsdp=256 on v5p:8x8x8
      train=dict(steps=steps, global_batch=BATCH, microbatch=512),  # the paper does not say its microbatch
    )
  )
