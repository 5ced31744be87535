"""A larger sibling of tiny_dense: 5.0M parameters; fewer bits per byte than gzip after half an hour or more on two CPU cores."""

from ml_collections import ConfigDict

STEPS = 2000  # half an hour on two CPU cores


def get_config():
  return ConfigDict(
    dict(
      name="small_dense",
      model=dict(  # sizes: half an hour on two CPU cores
        vocab=272,  # 256 bytes + the document separator, padded to a multiple of 16
        embed=256,
        layers=6,
        mlp=704,
        init_std=0.02,  # GPT-2's; 0.006 is for DeepSeek's widths of 1280 and more
        compute_dtype="float32",  # what CPUs multiply fastest everywhere
        remat="full",  # measured faster than none: what is kept is written and read again
        attention=dict(heads=4, kv_heads=4, head_dim=64),  # multi-head attention of width 256
      ),
      data=dict(seq=256, heldout_fraction=0.05),  # 5% of a small corpus: 0.4 MB to compare models on
      # Set by hand; for the peak, the law of arXiv:2401.02954, section 3.1 gives about 5e-3 for these FLOPs.
      schedule=dict(kind="warmup_cosine", peak=2e-3, warmup_steps=100, steps=STEPS, factors=(0.1,)),
      train=dict(steps=STEPS, global_batch=16),
      checkpoint=dict(every=200),  # about five minutes of work
      eval=dict(every=500, sequences=128),  # seconds, beside ten minutes of steps
      log=dict(every=1),  # a line costs nothing beside a step
    )
  )
