"""DeepSeek LLM 7B (arXiv:2401.02954, tables 2 and 3): multi-head attention, 2T tokens.

Shape from table 2 and the released config.json (inner width 11008); training from section 2.3 and table 2.
"""

from ml_collections import ConfigDict

TOKENS = 2_000_000_000_000
BATCH, SEQ = 2304, 4096


def get_config():
  steps = -(-TOKENS // (BATCH * SEQ))
  return ConfigDict(
    dict(
      name="7b",
      model=dict(
        vocab=102_400,
        embed=4096,
        layers=30,
        mlp=11_008,
        init_std=0.006,
        attention=dict(heads=32, kv_heads=32, head_dim=128, rope_theta=10_000.0),
      ),
      data=dict(tokenizer="deepseek-llm", seq=SEQ),
      optimizer=dict(clip=1.0, beta1=0.9, beta2=0.95, weight_decay=0.1),
      schedule=dict(
        kind="multi_step", peak=4.2e-4, warmup_steps=2000, tokens=TOKENS, milestones=(0.8, 0.9), factors=(0.316, 0.1)
      ),
      mesh=dict(data=1, fsdp=-1, context=2),  # fsdp=128 on v5e:16x16
      train=dict(steps=steps, global_batch=BATCH, microbatch=256),  # the paper does not say its microbatch
    )
  )
