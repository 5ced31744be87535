"""A V3 of 24M parameters, for comparing step time with other software.

python -m benchmarks.train_step --config=benchmarks/v3_24m.py      (compare with: benchmarks/torch_v3_24m.py)
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    dict(
      name="v3_24m",
      model=dict(
        vocab=32_768,
        embed=256,
        layers=4,
        first_dense_layers=1,
        mlp=1024,
        init_std=0.02,
        compute_dtype="float32",
        remat="none",
        attention=dict(
          kind="mla", heads=8, q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
        ),
        moe=dict(
          num_routed_experts=8, num_shared_experts=1, num_experts_per_token=2, mlp=256, score="sigmoid", router_bias=True,
          norm_topk_prob=True, route_scale=2.5,
        ),
      ),
      data=dict(tokenizer="tokenizer.json", seq=256),
      balance=dict(bias_update_rate=1e-3, expert_loss=1e-4),
      train=dict(global_batch=4, loss_chunk=64),
    )
  )  # fmt: skip
