"""A dense model to start with: 1.4B parameters, grouped-query attention, recipe of DeepSeek LLM, 28B tokens.

The widths are those of Llama 3.2 1B, the training is that of DeepSeek LLM (arXiv:2401.02954). Its scaling laws (section
3.1, eq. 1) give the peak learning rate and the batch for a compute of C = M x TOKENS = 2.1e20 FLOPs.

- M = 7.45e9 is the non-embedding FLOPs per token (section 3.2): 6 for each of the 0.973B parameters of the layers, and
  12 x layers x embed x seq for attention.
- A run of another length needs another learning rate and batch: compute both again.
"""

from ml_collections import ConfigDict

TOKENS = 28_000_000_000  # 20 a parameter (arXiv:2203.15556, table 3); DeepSeek LLM, section 3.2, eq. 4 gives 26B
BATCH = 320  # 0.2920 C^0.3271 = 1.29M tokens = 316 sequences, rounded to a multiple of 64
SEQ = 4096  # DeepSeek LLM, table 2


def get_config():
  steps = -(-TOKENS // (BATCH * SEQ))  # as many as the tokens take
  return ConfigDict(
    dict(
      name="1b",
      model=dict(  # config.json of meta-llama/Llama-3.2-1B; the output head is not tied, as in DeepSeek models
        vocab=102_400,  # DeepSeek LLM, section 2.1: 30% of the parameters; V3's 129,280 rows would be 35%
        embed=2048,
        layers=16,
        mlp=8192,
        # As in Llama 3.2 1B, four query heads share a key head. Heads are twice as wide: 128, as in all DeepSeek
        # models, suits matrix units and fused kernels. Parameters and cache are the same.
        attention=dict(heads=16, kv_heads=4, head_dim=128),
      ),
      data=dict(tokenizer="deepseek-llm", seq=SEQ),  # goes with the vocabulary
      schedule=dict(  # DeepSeek LLM, section 2.3
        kind="multi_step", warmup_steps=2000, tokens=TOKENS, milestones=(0.8, 0.9), factors=(0.316, 0.1),
        peak=9.0e-4,  # 0.3118 C^-0.1250
      ),
      mesh=dict(data=1, fsdp=-1),  # parameters and moments sharded over all devices
      train=dict(
        steps=steps,
        global_batch=BATCH,
        # 8 sequences on each of 8 GPUs, or one on each of 64 TPU v5e (deepseek_jax.plan: 28 and 3 GiB a device). One
        # GPU of 80 GB takes 8 in all.
        microbatch=64,
      ),
    )
  )  # fmt: skip
