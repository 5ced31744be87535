"""DeepSeek LLM 67B: 67.4B parameters, dense, grouped-query attention, 2T tokens (arXiv:2401.02954)."""

from ml_collections import ConfigDict

TOKENS = 2_000_000_000_000  # table 2
BATCH, SEQ = 4608, 4096  # table 2


def get_config():
  steps = -(-TOKENS // (BATCH * SEQ))  # as many as the tokens take
  return ConfigDict(
    dict(
      name="67b",
      model=dict(  # table 2
        vocab=102_400,  # section 2.1
        embed=8192,
        layers=95,
        mlp=22_016,  # config.json of deepseek-ai/deepseek-llm-67b-base; section 2.2 says 8/3 of the width
        init_std=0.006,  # section 2.3
        remat="dots",  # found by plan --search for v5p:8x8x8: products fit, and need not be made again
        attention=dict(heads=64, kv_heads=8, head_dim=128, rope_theta=10_000.0),  # table 2; head_dim is embed / heads
      ),
      data=dict(tokenizer="deepseek-llm", seq=SEQ),  # section 2.1; table 2
      optimizer=dict(clip=1.0, beta1=0.9, beta2=0.95, weight_decay=0.1),  # section 2.3
      schedule=dict(  # section 2.3; peak: table 2
        kind="multi_step", peak=3.2e-4, warmup_steps=2000, tokens=TOKENS, milestones=(0.8, 0.9), factors=(0.316, 0.1)
      ),
      mesh=dict(data=1, fsdp=-1, context=2),  # found by plan --search for v5p:8x8x8, where fsdp is 256
      train=dict(
        steps=steps,
        global_batch=BATCH,
        microbatch=512,  # found by plan --search for v5p:8x8x8; the paper does not say its own
      ),
    )
  )
