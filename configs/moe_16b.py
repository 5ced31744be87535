"""DeepSeekMoE 16B: 16.4B parameters, fine-grained and shared experts, softmax router, 2T tokens (arXiv:2401.06066)."""

from ml_collections import ConfigDict

STEPS = 106_449  # section 5.1.2, whose "2T tokens" are rounded: with its batch this is 2.009T
BATCH, SEQ = 4608, 4096  # section 5.1.2: 18M tokens


def get_config():
  return ConfigDict(
    dict(
      name="moe_16b",
      model=dict(  # section 5.1.2, table 7
        vocab=102_400,  # config.json of deepseek-ai/deepseek-moe-16b-base
        embed=2048,
        layers=28,
        first_dense_layers=1,
        mlp=10_944,  # config.json of deepseek-ai/deepseek-moe-16b-base
        init_std=0.006,
        attention=dict(heads=16, kv_heads=16, head_dim=128, rope_theta=10_000.0),  # section 5.1.2, table 7
        moe=dict(  # section 5.1.2, table 7
          num_routed_experts=64,
          num_shared_experts=2,
          num_experts_per_token=6,
          mlp=1408,  # config.json of deepseek-ai/deepseek-moe-16b-base
        ),
      ),
      data=dict(tokenizer="deepseek-llm", seq=SEQ),  # config.json's vocabulary is that of DeepSeek LLM
      optimizer=dict(clip=1.0, beta1=0.9, beta2=0.95, weight_decay=0.1),  # section 5.1.2
      schedule=dict(  # section 5.1.2
        kind="multi_step", peak=4.2e-4, warmup_steps=2000, steps=STEPS, milestones=(0.8, 0.9), factors=(0.316, 0.1)
      ),
      balance=dict(expert_loss=0.001),  # section 5.1.2; no device-level loss: a layer's experts are on one device
      mesh=dict(data=1, fsdp=-1),  # parameters and moments sharded over all devices
      train=dict(
        steps=STEPS,
        global_batch=BATCH,
        microbatch=512,  # a ninth of the batch, to bound memory; the paper does not say its own
      ),
    )
  )
