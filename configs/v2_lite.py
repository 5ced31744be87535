"""DeepSeek-V2-Lite: 15.7B parameters, MLA without query compression, 5.7T tokens (arXiv:2405.04434, appendix B).

YaRN is off: it belongs to the extension to 32K that follows pre-training at 4K.
"""

from ml_collections import ConfigDict

TOKENS = 5_700_000_000_000  # appendix B.1
BATCH, SEQ = 4608, 4096  # appendix B.1


def get_config():
  steps = -(-TOKENS // (BATCH * SEQ))  # as many as the tokens take
  return ConfigDict(
    dict(
      name="v2_lite",
      model=dict(  # appendix B.1
        vocab=102_400,  # DeepSeek's inference/configs/config_16B.json
        embed=2048,
        layers=27,
        first_dense_layers=1,
        mlp=10_944,  # DeepSeek's inference/configs/config_16B.json
        init_std=0.006,
        attention=dict(  # appendix B.1
          kind="mla", heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        moe=dict(num_routed_experts=64, num_shared_experts=2, num_experts_per_token=6, mlp=1408),  # appendix B.1
      ),
      data=dict(tokenizer="deepseek-llm", seq=SEQ),  # section 3.1.1: DeepSeek 67B's tokenizer; appendix B.1
      optimizer=dict(clip=1.0, beta1=0.9, beta2=0.95, weight_decay=0.1),  # appendix B.1
      schedule=dict(  # appendix B.1
        kind="multi_step", peak=4.2e-4, warmup_steps=2000, tokens=TOKENS, milestones=(0.8, 0.9), factors=(0.316, 0.1)
      ),
      balance=dict(expert_loss=0.001),  # appendix B.1; no device-level loss: a layer's experts are on one device
      mesh=dict(data=1, fsdp=-1),  # parameters and moments sharded over all devices
      train=dict(
        steps=steps,
        global_batch=BATCH,
        microbatch=512,  # a ninth of the batch, to bound memory; the paper does not say its own
      ),
    )
  )
