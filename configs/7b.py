"""DeepSeek LLM 7B: 6.9B parameters, dense, multi-head attention, 2T tokens (arXiv:2401.02954)."""

from ml_collections import ConfigDict

TOKENS = 2_000_000_000_000  # table 2
BATCH, SEQ = 2304, 4096  # table 2


def get_config():
  steps = -(-TOKENS // (BATCH * SEQ))  # as many as the tokens take
  return ConfigDict(
    dict(
      name="7b",
      model=dict(  # table 2
        vocab=102_400,  # section 2.1
        embed=4096,
        layers=30,
        mlp=11_008,  # config.json of deepseek-ai/deepseek-llm-7b-base; section 2.2 says 8/3 of the width
        init_std=0.006,  # section 2.3
        attention=dict(heads=32, kv_heads=32, head_dim=128, rope_theta=10_000.0),  # table 2; head_dim is embed / heads
      ),
      data=dict(tokenizer="deepseek-llm", seq=SEQ),  # section 2.1; table 2
      optimizer=dict(clip=1.0, beta1=0.9, beta2=0.95, weight_decay=0.1),  # section 2.3
      schedule=dict(  # section 2.3; peak: table 2
        kind="multi_step", peak=4.2e-4, warmup_steps=2000, tokens=TOKENS, milestones=(0.8, 0.9), factors=(0.316, 0.1)
      ),
      mesh=dict(data=1, fsdp=-1, context=2),  # found by plan --search for v5e:16x16, where fsdp is 128
      train=dict(
        steps=steps,
        global_batch=BATCH,
        microbatch=256,  # found by plan --search for v5e:16x16; the paper does not say its own
      ),
    )
  )
