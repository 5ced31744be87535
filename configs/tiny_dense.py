"""A small dense model: 1.9M parameters; learns Python on two CPU cores in minutes.

Its data is the interpreter's own library.
"""

from ml_collections import ConfigDict

STEPS = 1100  # minutes on two CPU cores


def get_config():
  return ConfigDict(
    dict(
      name="tiny_dense",
      model=dict(  # sizes: minutes on two CPU cores
        vocab=272,  # 256 bytes + the document separator, padded to a multiple of 16
        embed=192,
        layers=4,
        mlp=512,
        init_std=0.02,  # GPT-2's; 0.006 is for DeepSeek's widths of 1280 and more
        compute_dtype="float32",  # what CPUs multiply fastest everywhere
        remat="full",  # measured faster than none: what is kept is written and read again
        attention=dict(heads=4, kv_heads=4, head_dim=48),  # multi-head attention of width 192
      ),
      data=dict(seq=256, heldout_fraction=0.05),  # 5% of a small corpus: 0.4 MB to compare models on
      # Set by hand; for the peak, the law of arXiv:2401.02954, section 3.1 gives about 6e-3 for these FLOPs.
      schedule=dict(kind="warmup_cosine", peak=3e-3, warmup_steps=100, steps=STEPS, factors=(0.1,)),
      train=dict(steps=STEPS, global_batch=8),  # 2,048 tokens a step, so that there are hundreds of steps
      checkpoint=dict(every=250),  # about a minute of work
      eval=dict(every=250, sequences=128),  # seconds, beside a minute of steps
      log=dict(every=1),  # a line costs nothing beside a step
    )
  )
