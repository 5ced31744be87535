"""A dense model of 1.2B parameters for one 80 GB GPU: LLaMA architecture with grouped-query attention, 4096 positions.

python -m benchmarks.train_step --config=benchmarks/dense_1b.py      (part of: python -m benchmarks.gpu --part=2)

Master weights and both moments are float32. Widths are multiples of 128, which the FP8 kernels for Hopper need.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    dict(
      name="dense_1b",
      model=dict(
        vocab=32_768,
        embed=2048,
        layers=24,
        mlp=5632,
        init_std=0.02,
        remat="full",
        attention=dict(heads=16, kv_heads=4, head_dim=128),
      ),
      data=dict(tokenizer="tokenizer.json", seq=4096),
      train=dict(global_batch=16, microbatch=8),
    )
  )
