"""DeepSeekMoE 16B (arXiv:2401.06066, section 5.1): fine-grained and shared experts, softmax router, 2T tokens.

Shape from table 7 and the released config.json (dense inner width 10944, expert inner width 1408).
"""

from ml_collections import ConfigDict

STEPS = 106_449  # as the paper says, whose "2T tokens" are rounded: with its batch this is 2.009T
BATCH, SEQ = 4608, 4096


def get_config():
  return ConfigDict(
    dict(
      name="moe_16b",
      model=dict(
        vocab=102_400,
        embed=2048,
        layers=28,
        first_dense_layers=1,
        mlp=10_944,
        init_std=0.006,
        attention=dict(heads=16, kv_heads=16, head_dim=128, rope_theta=10_000.0),
        moe=dict(num_routed_experts=64, num_shared_experts=2, num_experts_per_token=6, mlp=1408),
      ),
      data=dict(tokenizer="deepseek-llm", seq=SEQ),
      optimizer=dict(clip=1.0, beta1=0.9, beta2=0.95, weight_decay=0.1),
      schedule=dict(
        kind="multi_step", peak=4.2e-4, warmup_steps=2000, steps=STEPS, milestones=(0.8, 0.9), factors=(0.316, 0.1)
      ),
      balance=dict(expert_loss=0.001),  # no device-level loss: a layer's experts stand on one device
      mesh=dict(data=1, fsdp=-1),
      train=dict(steps=STEPS, global_batch=BATCH, microbatch=512),  # the paper does not say its microbatch
    )
  )
