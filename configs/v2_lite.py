"""DeepSeek-V2-Lite (arXiv:2405.04434, appendix B): latent attention without query compression, 5.7T tokens.

Inner width of the dense layer and of the experts from DeepSeek's inference/configs/config_16B.json. YaRN is off: it
belongs to the extension to 32K that follows pre-training at 4K.
"""

from ml_collections import ConfigDict

TOKENS = 5_700_000_000_000
BATCH, SEQ = 4608, 4096


def get_config():
  steps = -(-TOKENS // (BATCH * SEQ))
  return ConfigDict(
    dict(
      name="v2_lite",
      model=dict(
        vocab=102_400,
        embed=2048,
        layers=27,
        first_dense_layers=1,
        mlp=10_944,
        init_std=0.006,
        attention=dict(
          kind="mla", heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        moe=dict(num_routed_experts=64, num_shared_experts=2, num_experts_per_token=6, mlp=1408),
      ),
      data=dict(tokenizer="deepseek-llm", seq=SEQ),
      optimizer=dict(clip=1.0, beta1=0.9, beta2=0.95, weight_decay=0.1),
      schedule=dict(
        kind="multi_step", peak=4.2e-4, warmup_steps=2000, tokens=TOKENS, milestones=(0.8, 0.9), factors=(0.316, 0.1)
      ),
      balance=dict(expert_loss=0.001),  # both the paper and the released config; experts of a layer on one device
      mesh=dict(data=1, fsdp=-1),
      train=dict(steps=steps, global_batch=BATCH, microbatch=512),  # the paper does not say its microbatch
    )
  )
