"""The lines of --dry_run."""

from deepseek_jax.config import Config, TrainConfig
from deepseek_jax.plan.summary import planned_tokens


def test_planned_tokens_of_a_ramp():
  """4 updates of 4 sequences, 2 of 8, 2 of 12 by hand, then 16: tokens seen 0, 4, .. of a ramp over 48 sequences."""
  ramp = dict(global_batch=16, microbatch=4, batch_ramp_from=4, batch_ramp_tokens=48 * 256)
  sizes = [4, 4, 4, 4, 8, 8, 12, 12]
  for steps in (1, 5, 8, 20):
    config = Config(train=TrainConfig(steps=steps, **ramp))
    assert planned_tokens(config) == 256 * (sum(sizes[:steps]) + 16 * max(0, steps - len(sizes)))
