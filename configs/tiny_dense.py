"""A dense model that learns Python from the interpreter's own library in a few minutes on two CPU cores.

python -m deepseek_jax.train --config=configs/tiny_dense.py
"""

from ml_collections import ConfigDict

STEPS = 1100


def get_config():
  return ConfigDict(
    dict(
      name="tiny_dense",
      model=dict(
        vocab=272,  # 256 bytes + the document separator, padded so that tensor=4 divides it
        embed=192,
        layers=4,
        mlp=512,
        init_std=0.02,
        compute_dtype="float32",  # what CPUs multiply fastest everywhere
        remat="full",  # measured faster than none: what is kept is written and read again
        attention=dict(heads=4, kv_heads=4, head_dim=48),
      ),
      data=dict(seq=256, heldout_fraction=0.05),
      schedule=dict(kind="warmup_cosine", peak=3e-3, warmup_steps=100, steps=STEPS, factors=(0.1,)),
      train=dict(steps=STEPS, global_batch=8),
      checkpoint=dict(every=250),
      eval=dict(every=250, sequences=128),
      log=dict(every=1),
    )
  )
