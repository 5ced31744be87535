"""A larger sibling of tiny: about half an hour on two CPU cores, and its bits per byte go below gzip's."""

from ml_collections import ConfigDict

STEPS = 2000


def get_config():
  return ConfigDict(
    dict(
      name="small",
      model=dict(
        vocab=272,
        embed=256,
        layers=6,
        mlp=704,
        init_std=0.02,
        compute_dtype="float32",
        remat="full",
        attention=dict(heads=4, kv_heads=4, head_dim=64),
      ),
      data=dict(seq=256, heldout_fraction=0.05),
      schedule=dict(kind="warmup_cosine", peak=2e-3, warmup_steps=100, steps=STEPS, factors=(0.1,)),
      train=dict(steps=STEPS, global_batch=16),
      checkpoint=dict(every=200),
      eval=dict(every=500, sequences=128),
      log=dict(every=1),
    )
  )
