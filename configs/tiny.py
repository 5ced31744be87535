"""A dense model that learns Python from the interpreter's own library in a few minutes on two CPU cores.

make train
"""

from ml_collections import ConfigDict

STEPS = 1200


def get_config():
  return ConfigDict(
    dict(
      name="tiny",
      model=dict(
        vocab=272,  # 256 bytes + the document separator, padded so that tensor=4 divides it
        embed=256,
        layers=4,
        mlp=704,
        init_std=0.02,
        compute_dtype="float32",  # what CPUs multiply fastest everywhere
        remat="none",
        attention=dict(heads=8, kv_heads=4, head_dim=32),
      ),
      data=dict(seq=256, heldout_fraction=0.05),
      schedule=dict(kind="warmup_cosine", peak=2e-3, warmup_steps=100, steps=STEPS, factors=(0.1,)),
      train=dict(steps=STEPS, global_batch=16),
      checkpoint=dict(every=200),
      eval=dict(every=300, sequences=64),
      log=dict(every=1),
    )
  )
